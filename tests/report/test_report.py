"""The report's page: what it says of one run, several, a sweep; what it refuses; that no text is markup."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import make_fit, make_run, make_sweep

from sisa_dist.cli import main
from sisa_dist.config import UserError
from sisa_dist.report.chart import Line, Scale, heat_map, labels, line_chart, thin, tidy
from sisa_dist.report.page import write_report
from sisa_dist.report.read import read_run


class Page(HTMLParser):
    """Sections with their text, captions of figures, and what is not well-formed."""

    _VOID = ("meta", "path", "circle", "polyline", "rect")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.captions: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "section":
            self.sections[dict(attrs)["id"] or ""] = ""
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "section" in self.open:
            name = list(self.sections)[-1]
            self.sections[name] += data + " "
        if self.open[-1:] == ["figcaption"]:
            self.captions.append(data)


def test_the_page_of_one_run_has_all_that_it_has(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", learned=True)
    assert write_report([run]) == run / "report.html"
    page = Page(run / "report.html")
    parts = ["summary", "curves", "speed", "layers", "experts", "positions", "retrieval"]
    assert list(page.sections) == parts  # of one run no key differs
    for said in ("3.0300", "3.1100", "3.1110", "8k", "31.0%", "1.00 GiB", "409.6k"):
        assert said in page.sections["summary"], said
    layers = page.sections["layers"]
    for said in ("λ", "Half-life", "Attention mass", "|q·k/√d|", "|importance term|", "d_s"):
        assert said in layers
    assert "layer 2: 0.06" in layers and "layer 3:" not in layers  # an attention layer has none
    assert "layer 0: 12" in layers  # of the gates, not of the config, which says 32
    assert "niah: effective length 256" in page.sections["retrieval"]
    assert "multiquery: effective length none" in page.sections["retrieval"]
    assert "256 tokens, depth 0.5: 50.0 %" in page.sections["retrieval"]
    assert "run: busiest expert (1 is a fair share)" in page.captions and "layer 1: 1.6" in page.sections["experts"]
    assert "layer 1: 0.4" in page.sections["experts"]


def test_runs_side_by_side_have_a_colour_each_and_the_keys_in_which_they_differ(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "a" / "run", "model.d_s=16", extras=False),
        make_run(tmp_path / "b" / "run", "optimizer.lr=1e-3", extras=False),
        make_run(tmp_path / "c" / "run", "model.mixer=attention", "model.d_s=null", extras=False),
    ]
    out = write_report([*folders, folders[0]], tmp_path / "page.html")
    page = Page(out)
    assert list(page.sections) == ["summary", "curves", "speed", "layers", "config"]
    assert re.findall(r"a/run|b/run|c/run", page.sections["summary"])[:3] == ["a/run", "b/run", "c/run"]
    config = page.sections["config"]
    assert all(key in config for key in ("model.d_s", "model.mixer", "optimizer.lr"))
    assert "model.d_model" not in config and "output_dir" not in config
    text = out.read_text(encoding="utf-8")
    for number, name in enumerate(("a/run", "b/run", "c/run")):
        groups = re.findall(rf'style="(--c:[^"]*)"><title>{name}[:,]', text)
        assert len(groups) >= 6 and set(groups) == {f"--c:var(--c{number})"}


def test_the_page_of_a_sweep(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "grid")
    write_report([sweep])
    assert "fits" not in Page(sweep / "report.html").sections
    make_fit(sweep)
    page = Page(write_report([sweep]))
    assert list(page.sections) == ["sweep", "fits", "summary", "curves", "speed", "layers", "config"]
    assert "4 runs: 2 finished, 2 running" in page.sections["sweep"]
    assert "sisa, d_s 16" in page.sections["sweep"] and "Held-out loss of finished runs" in page.captions
    assert write_report([sweep], tmp_path / "again.html").read_bytes() == (sweep / "report.html").read_bytes()
    fits = page.sections["fits"]
    for said in (
        "A 332.4 [265.9, 681.1]",
        "alpha 0.3277",
        "0.5296 [0.485, 0.5464]",
        "0.57 %, of the 4 runs with the most FLOPs",
        "8.9e07 [6.7e07, 1e08]",
        "not known",
        "the best d_s is 24.5 at every size",
        "24.5 [20, 31]",
        "mixer attention, isoflop: there are 0 slices",
    ):
        assert said in fits, said


def test_no_text_of_a_file_is_markup(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>&\"'"
    run = make_run(tmp_path / "<script>x", f"name={json.dumps(bad)}")
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    found["retrieval"]["effective_length"] = 256
    found["retrieval"]["tasks"]["niah"]["effective_length"] = bad
    found["retrieval"]["tasks"][bad] = found["retrieval"]["tasks"].pop("multiquery")
    found["retrieval"]["lengths"] = [bad, 512]
    found["niah"]["context"] = bad
    found["positions"] = {"sources": {bad: found["positions"]}}
    (run / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    other = make_run(tmp_path / "other", f"data.input={json.dumps(bad)}", extras=False)
    page = Page(write_report([run, other], tmp_path / "page.html"))
    assert "script" not in page.tags and "img" not in page.tags
    assert bad in page.sections["retrieval"] and bad in page.sections["config"] and bad in page.sections["positions"]
    sweep = make_sweep(tmp_path / "grid")
    fit = make_fit(sweep)
    fit["fits"][0] |= {"where": {bad: bad}, "source": bad, "form": bad}
    fit["d_s"][0]["verdict"] = fit["skipped"][0]["reason"] = bad
    (sweep / "fit/fit.json").write_text(json.dumps(fit), encoding="utf-8")
    table = (sweep / "results.csv").read_text(encoding="utf-8").replace("running", "<b>running")
    (sweep / "results.csv").write_text(table, encoding="utf-8")
    page = Page(write_report([sweep]))
    assert "script" not in page.tags and "b" not in page.tags and bad in page.sections["fits"]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("evaluation.json", "not JSON"),
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"perplexity": {"loss": "low"}}'),
        ("evaluation.json", '{"perplexity": 3}'),
        ("evaluation.json", '{"niah": {"accuracy": 1.0}}'),
        ("evaluation.json", '{"retrieval": {"lengths": [1], "depths": [0], "tasks": {"a": {"score": [[1, 2]]}}}}'),
        ("evaluation.json", '{"retrieval": []}'),
        ("evaluation.json", '{"positions": {"from": [0], "seq_len": 4, "loss_by_position": [[]]}}'),
        ("evaluation.json", "\\xff"),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n'),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "tokens": "many"}\n'),
        ("metrics.jsonl", '[1]\n{"kind": "train", "step": 1}\n'),
        ("config.yaml", "model: 3\n"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_it(tmp_path: Path, file: str, change: str) -> None:
    run = make_run(tmp_path / "run")
    (run / file).write_bytes(change.encode().replace(b"\\xff", b"\xff"))
    with pytest.raises(UserError) as caught:
        write_report([run])
    assert str(run / file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("results.csv", "run,loss\na,3\n"),
        ("results.csv", ""),
        ("curves.csv", "run,flops,loss\na,3\n"),
        ("curves.csv", "run,flops,loss\na,b,c\n"),
        ("fit/fit.json", '{"fits": [{}], "d_s": [], "skipped": []}'),
        ("fit/fit.json", "{}"),
    ],
)
def test_a_malformed_file_of_a_sweep_is_one_line_that_names_it(tmp_path: Path, file: str, change: str) -> None:
    sweep = make_sweep(tmp_path / "grid", runs=2)
    make_fit(sweep)
    (sweep / file).write_text(change, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        write_report([sweep])
    assert str(sweep / file) in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="name the folder of a trained run"):
        write_report([tmp_path / "empty"])
    (tmp_path / "empty/metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no training step yet: train it first"):
        write_report([tmp_path / "empty"])
    run, sweep = make_run(tmp_path / "run"), make_sweep(tmp_path / "grid", runs=1)
    with pytest.raises(UserError, match="is a sweep, with its runs: name it alone"):
        write_report([run, sweep])
    with pytest.raises(UserError, match="there is no folder"):
        write_report([run], tmp_path / "absent" / "page.html")


def test_fifty_runs_make_a_small_page(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "grid", runs=50, steps=260)
    first = write_report([sweep]).read_bytes()
    assert len(first) < 2_000_000
    Page(sweep / "report.html")
    styles = set(re.findall(rb'style="(--c:[^"]*)"><title>size', first))
    assert len(styles) >= 50  # each a colour or a dash of its own


def test_a_run_that_diverged_or_has_one_step_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, extras=False)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    Page(write_report([run]))
    again = [lines[0].replace('"step": 1', f'"step": {n}').replace('"loss": 6.0', '"loss": NaN') for n in range(2, 9)]
    (run / "metrics.jsonl").write_text("\n".join([lines[0], *again]) + "\n", encoding="utf-8")
    page = Page(write_report([run]))
    assert "nan" not in page.sections["curves"].lower()
    (run / "metrics.jsonl").write_text("\n".join(again) + "\n", encoding="utf-8")
    Page(write_report([run]))


def test_thinning_keeps_ends_peaks_and_gaps() -> None:
    x = [float(i) for i in range(5000)]
    y = [math.sin(i / 300) for i in range(5000)]
    y[1234], y[3456], y[4010] = 9.0, -9.0, 8.0
    y[1200], y[4000] = math.nan, math.inf  # beside peaks
    y[2500:2700] = [math.nan] * 200
    kept = thin(x, y, 100)
    assert len(kept) <= 100 and kept[0] == (0.0, y[0]) and kept[-1] == (4999.0, y[-1])
    assert {(1234.0, 9.0), (3456.0, -9.0), (4010.0, 8.0)} <= set(kept)
    gaps = [place for place, value in kept if not math.isfinite(value)]
    assert gaps and all(2500 <= place < 2700 for place in gaps)
    assert [point[0] for point in kept] == sorted(point[0] for point in kept)
    assert thin(x[:50], y[:50], 100) == list(zip(x[:50], y[:50], strict=True))


@pytest.mark.parametrize(
    ("values", "log", "wanted"),
    [
        ([0.0, 10.0], False, [0, 2, 4, 6, 8, 10]),
        ([3.1, 3.4], False, [3.1, 3.15, 3.2, 3.25, 3.3, 3.35, 3.4]),
        ([1.0, 100.0], True, [1, 2, 5, 10, 20, 50, 100]),
        ([1e12, 1e18], True, [10.0**k for k in range(12, 19)]),
        ([3.5, 14.0], True, [4, 6, 8, 10, 12, 14]),
        ([1.1e12, 1.9e12], True, [n * 1e11 for n in (12, 14, 16, 18)]),
        ([-1e308, 1e308], False, [n * 5e279 for n in range(-2, 3)]),
    ],
)
def test_ticks_are_round_and_few(values: list[float], log: bool, wanted: list[float]) -> None:
    scale = Scale(values, (0.0, 100.0), log=log, margin=0.0)
    assert scale.ticks() == pytest.approx(wanted)
    assert scale(values[0]) == pytest.approx(0) and scale(values[-1]) == pytest.approx(100)


@pytest.mark.parametrize("x", [(3.2e12,), (1.1e12, 1.9e12), (1e308,), (1.0, 1e308), (5e-324,), (1.0, math.inf)])
@pytest.mark.parametrize("y", [3.0, 1e308, -1e308, math.nan])
def test_every_value_of_a_float_is_drawn(x: tuple[float, ...], y: float) -> None:
    """However little of a decade the values span, and however far apart they are."""
    for log_y in (False, None):
        lines = [Line("a", x, [y] * len(x), "--c:red"), Line("b", x, [2.0, 1e308][: len(x)], "--c:red")]
        drawn = line_chart("t", lines, x_label="x", log_x=True, log_y=log_y)
        places = [float(value) for found in re.findall(r'c[xy]="([^"]*)"', drawn) for value in found.split()]
        assert places and all(0 <= place <= 420 for place in places)
        assert drawn.count('class="tick"') > 1 and drawn.count('class="grid"') > 1


def test_values_alike_empty_and_not_positive_are_drawn(tmp_path: Path) -> None:
    def line(*y: float) -> Line:
        return Line("a", [float(i + 1) for i in range(len(y))], y, "--c:red")

    assert line_chart("t", [line(math.nan)], x_label="x") == "" and line_chart("t", [], x_label="x") == ""
    for y in ((2.0, 2.0), (0.0, 0.0), (-1.0, 5.0), (1.0,), (1e-30, 1e-30)):
        for log_y in (False, None):
            assert "nan" not in line_chart("t", [line(*y)], x_label="x", log_y=log_y)
    assert line_chart("t", [line(1.0, math.nan, 2.0, 3.0)], x_label="x").count("<polyline") == 1
    assert heat_map("t", ["1"], ["a"], [[math.nan]]).count("<rect") == 0
    assert labels([0.31345, 0.3135, 0.31355]) == ["0.31345", "0.3135", "0.31355"] and labels([5.0]) == ["5"]
    assert labels([0.0, 0.5, 1.0, 1.5]) == ["0", "0.5", "1", "1.5"]
    assert [tidy(v) for v in (0.0, 1e-5, 0.25, 950.0, 1500.0, 2.5e6)] == ["0", "1e-05", "0.25", "950", "1.5k", "2.5M"]


def test_a_run_of_stages_names_them_in_its_keys(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", extras=False)
    tree = (run / "config.yaml").read_text(encoding="utf-8")
    short = re.sub(r"\n  steps: \d+", "", tree, count=1)
    (run / "config.yaml").write_text(
        short + "stages:\n- {name: one, steps: 60}\n- {name: two, steps: 40}\n",
        encoding="utf-8",
    )
    config = read_run(run, "run").config
    assert config["stages.one.training.steps"] == 60 and config["stages.two.model.d_model"] == 256


def test_the_command_prints_the_page_or_one_line_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", extras=False)
    (tmp_path / "empty").mkdir()
    for folder, code in ((run, 0), (tmp_path / "empty", 2)):
        monkeypatch.setattr("sys.argv", ["sisa", "report", str(folder)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == code
    said = capsys.readouterr()
    assert said.out == f"report: {run / 'report.html'}\n"
    assert said.err.count("\n") == 1 and str(tmp_path / "empty/metrics.jsonl") in said.err
