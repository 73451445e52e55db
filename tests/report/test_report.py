"""The report's page: what it says of one run, several, a sweep; what it refuses; that no text is markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import POSITIONS, RETRIEVAL, make_fit, make_run, make_sweep

from sisa_dist.cli import main
from sisa_dist.config import UserError
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
    for said in ("3.0303", "3.1100", "3.1110", "8k", "31.0%", "1.00 GiB", "409.6k"):
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
        ("evaluation.json", '{"step": 100, "perplexity": {"loss": "low"}}'),
        ("evaluation.json", '{"step": 100, "perplexity": 3}'),
        ("evaluation.json", '{"step": 100, "niah": {"accuracy": 1.0}}'),
        (
            "evaluation.json",
            '{"step": 100, "retrieval": {"lengths": [1], "depths": [0], "tasks": {"a": {"score": [[1, 2]]}}}}',
        ),
        ("evaluation.json", '{"step": 100, "retrieval": []}'),
        ("evaluation.json", '{"step": 100, "positions": {"from": [0], "seq_len": 4, "loss_by_position": [[]]}}'),
        ("evaluation.json", '{"step": 100, "positions": {"from": [0, 2], "seq_len": 4, "loss_by_position": [3.0]}}'),
        ("evaluation.json", '{"step": 100, "positions": []}'),
        ("evaluation.json", '{"perplexity": {"loss": 3.0}}'),
        ("final.json", '{"step": null}'),
        ("evaluation.json", "\\xff"),
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
    "record",
    [
        '"train"',
        '"train", "tokens": "many"',
        '"evaluation", "validation_loss": true',
        '"layers", "lambda": [0.1, "x"], "half_life": []',
        '"scores", "content_max": 3',
        '"d_s", "layers": [0], "d_s": ["x"]',
        '"experts", "layers": [1], "counts": [[]]',
        '"experts", "layers": [1], "counts": 4',
        '"positions", "from": [0, 2], "seq_len": 4, "loss_by_position": [3.0]',
        '"positions", "sources": []',
        '"retrieval", "lengths": [1]',
    ],
)
def test_of_the_record_of_a_run_one_line_is_to_be_mended_and_nothing_removed(tmp_path: Path, record: str) -> None:
    run = make_run(tmp_path / "grid/runs/bad", steps=20)
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
    (run / "metrics.jsonl").write_text(f'{text}\n{{"step": 21, "kind": {record}}}\n', encoding="utf-8")
    kind = record.split('"')[1]
    with pytest.raises(UserError, match=rf"mend its {kind} record of step 21, or take that line out$") as caught:
        write_report([run])
    assert str(run / "metrics.jsonl") in str(caught.value) and "\n" not in str(caught.value)


def test_records_of_no_layer_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20, extras=False)
    found = '{"kind": "experts", "step": 20, "layers": [], "counts": []}\n'
    found += '{"kind": "d_s", "step": 20, "layers": [], "d_s": []}\n'
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
    (run / "metrics.jsonl").write_text(f"{text}\n{found}", encoding="utf-8")
    (run / "config.yaml").unlink()
    page = Page(write_report([run]))
    assert list(page.sections) == ["summary", "curves", "speed", "layers"] and "d_s" not in page.sections["layers"]


def test_the_newest_evaluation_counts_and_an_older_step_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    old = json.loads((run / "evaluation.json").read_text(encoding="utf-8")) | {"step": 60}
    old["perplexity"] = {"loss": 7.5}
    old["positions"] = POSITIONS | {"loss_by_position": [7.25, 7.25]}
    old["retrieval"] = json.loads(json.dumps(RETRIEVAL).replace("256", "32"))
    (run / "evaluation.json").write_text(json.dumps(old), encoding="utf-8")
    page = Page(write_report([run]))
    assert "7.5000" in page.sections["summary"] and "run: evaluated at step 60 of 100" in page.sections["summary"]
    assert "3.5" in page.sections["positions"] and "7.25" not in page.sections["positions"]  # of training, at its end
    assert "evaluated at" not in page.sections["positions"] and "niah: effective length 256" in page.captions
    (run / "final.json").write_text(json.dumps({"step": 90, "perplexity": {"loss": 6.5}}), encoding="utf-8")
    page = Page(write_report([run]))
    assert "6.5000" in page.sections["summary"] and "run: evaluated at step 90 of 100" in page.sections["summary"]
    new = old | {"step": 100, "retrieval": old["retrieval"] | {"effective_length": 1048576}}
    (run / "evaluation.json").write_text(json.dumps(new), encoding="utf-8")
    page = Page(write_report([run]))
    assert "7.5000" in page.sections["summary"] and "1048576" in page.sections["summary"]
    assert "7.25" in page.sections["positions"] and "niah: effective length 32" in page.captions
    assert "evaluated at" not in " ".join(page.sections.values())
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
    train = next(line for line in text.splitlines() if '"step": 100' in line).replace('"step": 100', '"step": 130')
    (run / "metrics.jsonl").write_text(f"{text}\n{train}\n", encoding="utf-8")
    page = Page(write_report([run]))
    for name in ("summary", "positions", "retrieval"):
        assert "run: evaluated at step 100 of 130" in page.sections[name]


def test_a_run_of_a_sweep_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "grid")
    (sweep / "runs/size1_attention/metrics.jsonl").write_text('{"kind": "train", "step": 1}\n', encoding="utf-8")
    (sweep / "runs/size2_sisa/metrics.jsonl").write_text("?\n?\n", encoding="utf-8")
    page = Page(write_report([sweep]))
    for name in ("size1_attention", "size2_sisa"):
        assert f"{name} is left out. {sweep}/runs/{name}/metrics.jsonl" in page.sections["sweep"]
        assert name not in page.sections["summary"]
    assert "size3_sisa" in page.sections["summary"] and "4 runs: 2 finished" in page.sections["sweep"]


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
    with pytest.raises(UserError, match="typo: no such folder: name the folder of a run or a sweep"):
        write_report([tmp_path / "typo"])
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
