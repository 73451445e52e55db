"""`sisa estimate --search`: what it proposes can be, fits, and is ranked; and what the command refuses."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

from distributed.pretending import alone
from hand_made import made_estimate
from sisa_dist import cli
from sisa_dist.config import RunConfig, UserError, load_config, load_run
from sisa_dist.training import search, show_estimate
from sisa_dist.training.changes import arguments, differences
from sisa_dist.training.devices import DEVICES, Device
from sisa_dist.training.estimate import estimate
from sisa_dist.training.first_look import FirstLook
from sisa_dist.training.outlook import Outlook, outlook_of
from sisa_dist.training.roofline import of_times
from sisa_dist.training.search import Search, describe_layout, search_layouts

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = ["model.n_layers=2", "model.vocab_size=2048", "training.global_batch_tokens=8192"]
# DeepSpeed's buckets are larger than so small a model.
ROOM = dataclasses.replace(DEVICES["h100"], memory=3e8, ranks_per_host=4)


def _supposed(config: RunConfig, device: Device, *, world_size: int) -> Outlook:
    """States, 30 MB a window and 10 of gathered weights; the time of a first look, a tenth more under DeepSpeed."""
    glance = FirstLook(device, world_size=world_size)
    kept = 1e7 if config.engine.activation_checkpointing else 3e7
    peak = glance.states(config) + 1e7 + kept * config.training.micro_batch_size
    seconds = glance(config)[1] * (1.1 if config.engine.kind == "deepspeed" else 1.0)
    times = dict.fromkeys(("recomputation", "backward", "optimizer", "waited", "overlapped", "host"), 0.0)
    mesh = {"dp_shard": world_size}
    bound = of_times(times | {"forward": seconds}, config, made_estimate(mesh=mesh), device)
    return Outlook(config, round(peak), bound, device.memory)


def _searched(overrides: list[str], memory: float, gpus: int = 8) -> tuple[RunConfig, Search, list[str]]:
    config, told = load_config(QUICKSTART, [*SMALL, *overrides]), []
    device = dataclasses.replace(ROOM, memory=memory)
    with mock.patch.object(search, "outlook", _supposed):
        return config, search_layouts(config, device, gpus=gpus, progress=told.append), told


DEEP = ["engine.kind=deepspeed", "engine.zero_stage=2", "parallel.dp=8"]
DEEP += ["engine.deepspeed_config={zero_optimization: {reduce_bucket_size: 1000}}"]


@pytest.mark.parametrize("overrides", [[], DEEP], ids=["fsdp2", "deepspeed"])
def test_what_is_proposed_fits_can_be_set_and_is_ranked(overrides: list[str]) -> None:
    config, found, told = alone(_searched, overrides, 2e8)
    assert len(found.found) == 5 and found.refused > 0 and found.left > 0
    assert len(told) == found.estimated  # each is announced
    seconds = [other.bound.seconds for other in found.found]
    assert seconds == sorted(seconds) and all(other.peak <= 2e8 for other in found.found)
    assert len({describe_layout(other.config) for other in found.found}) == 5  # one micro-batch of each layout
    for other in found.found:
        settings = arguments(differences(config, other.config)).replace("as it is", "")
        said = [part for part in shlex.split(settings) if part not in ("", "--set")]
        assert load_config(QUICKSTART, [*SMALL, *overrides, *said]) == other.config
        assert other.config.engine.kind == "deepspeed" or not other.config.engine.deepspeed_config
        assert other.config.parallel.dp_replicate == 1 or other.config.engine.kind == "fsdp2"
        # Twice the micro-batch would not fit, or has more windows than a rank's share of the batch.
        kept = 1e7 if other.config.engine.activation_checkpointing else 3e7
        size, data = other.config.training.micro_batch_size, 8 // other.config.parallel.tp
        assert other.peak + size * kept > 2e8 or 2 * size * data > config.training.global_batch_windows


def test_nothing_fits_and_nothing_is_tried_for_nothing() -> None:
    _, found, told = alone(_searched, [], 1e6)  # states alone are larger
    assert found.found == [] and found.estimated == 0 == len(told) and found.too_large > 50


def test_where_the_rules_refuse_all_the_first_reason_is_told() -> None:
    with pytest.raises(UserError, match=r"^training.global_batch_tokens 8192 is not a multiple .* 12") as told:
        alone(_searched, [], 2e8, gpus=12)
    assert "set it to" in str(told.value)


def test_the_configs_own_layout_is_among_them() -> None:
    own = ["parallel.tp=4", "engine.activation_checkpointing=true", "training.micro_batch_size=1"]
    config, found, _ = alone(_searched, own, 2e8)
    assert any((one.config.parallel, one.config.engine) == (config.parallel, config.engine) for one in found.found)


def test_a_stage_is_told_what_its_file_takes(tmp_path: Path) -> None:
    staged = tmp_path / "staged.yaml"
    shared = f"extends: {QUICKSTART}\ntraining: {{steps: null}}\nschedule: {{warmup_steps: 0}}\nparallel: {{tp: 1}}\n"
    staged.write_text(shared + "stages: [{name: a, steps: 40}, {name: b, steps: 10, parallel: {tp: 2}}]\n")
    run = load_run(staged)
    taken = show_estimate._to_set(run, run.named("a"), {"engine.precision": "bf16"})
    assert taken == "--set stages.a.engine.precision=bf16"
    assert load_run(staged, shlex.split(taken)[1:]).named("a").config.engine.precision == "bf16"
    told = show_estimate._to_set(run, run.named("b"), {"parallel.tp": 1, "engine.precision": "bf16"})
    assert told == "in stage b of the file: parallel.tp: 1, engine.precision: bf16"


def test_what_the_rules_refuse_is_counted() -> None:
    def tried(*overrides: str, gpus: int = 8) -> list[RunConfig]:
        found = Search()
        return list(search._valid(load_config(QUICKSTART, [*SMALL, *overrides]), ROOM, gpus, found)), found  # type: ignore

    plain, counts = tried()
    assert counts.refused > 0  # more windows than the batch has
    assert {c.parallel.tp for c in plain} == {1, 2, 4} and {c.parallel.cp for c in plain} == {1}
    assert {c.parallel.dp_replicate for c in plain} == {1, 2} and {c.parallel.ep for c in plain} == {1}
    assert {c.engine.zero_stage for c in plain if c.engine.kind == "deepspeed"} == {1, 2, 3}
    assert any(c == load_config(QUICKSTART, [*SMALL, "training.micro_batch_size=1"]) for c in plain)
    heads, _ = tried("model.n_heads=6", "model.d_model=384")
    assert {c.parallel.tp for c in heads} == {1, 2}
    experts, _ = tried("model.mlp=moe", "model.moe={experts: 4}")
    assert {(c.parallel.tp, c.parallel.ep) for c in experts} == {(1, 1), (1, 2), (1, 4), (2, 1), (4, 1)}
    assert all(c.engine.zero_stage in (1, 2) for c in experts if c.engine.kind == "deepspeed" and c.parallel.ep > 1)
    ring, _ = tried("parallel.cp=2", "parallel.cp_kind=ring")
    assert {(c.parallel.cp, c.parallel.cp_kind) for c in ring} == {(1, "all_gather"), (2, "ring"), (2, "ulysses")}
    long, _ = tried("training.seq_len=16384", "training.micro_batch_size=1", "training.global_batch_tokens=131072")
    assert {c.parallel.cp for c in long} == {1, 2, 4, 8}
    one, _ = tried(gpus=1)
    assert {c.engine.kind for c in one} == {"fsdp2"} and {c.parallel.tp for c in one} == {1}


def _looked_at(overrides: list[str]) -> tuple[float, float, int, int]:
    config = load_config(QUICKSTART, ["model.n_layers=4", "training.global_batch_tokens=8192", *overrides])
    glance, h100 = FirstLook(DEVICES["h100"], world_size=2), DEVICES["h100"]
    found = estimate(config, world_size=2)
    assert found.work and found.traffic and not any(work.operator.startswith("prim") for work in found.work)
    assert outlook_of(config, found, h100).peak == found.peak
    return glance(config)[0], glance.states(config), found.peak, found.states


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(
            ["engine.activation_checkpointing=true", "parallel.tp=2", "parallel.sequence_parallel=true"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "checkpointed_tp2"],
)
def test_a_first_look_is_no_more_than_is_held(overrides: list[str]) -> None:
    least, states, peak, exact = alone(_looked_at, overrides)
    assert states == exact
    assert exact <= least <= peak


@pytest.mark.slow
def test_a_real_search() -> None:
    found = alone(_really_searched, timeout=1200)
    assert len(found.found) > 1 and all(other.fits for other in found.found)
    seconds = [other.bound.seconds for other in found.found]
    assert seconds == sorted(seconds) and seconds[0] > 0


def _really_searched() -> Search:
    config = load_config(QUICKSTART, [*SMALL, "engine.precision=bf16"])
    return search_layouts(config, dataclasses.replace(ROOM, memory=1e9), gpus=2)


def _command(*arguments: str, monkeypatch: pytest.MonkeyPatch, config: Path = QUICKSTART) -> int:
    monkeypatch.setattr(sys, "argv", ["sisa", "estimate", str(config), *arguments])
    return cli._run()


REFUSED = {
    "--device h900": "--device h900 is not known: set one of a100-40gb",
    "--price 2": "--price is of a device: name it by --device",
    "--search --gpus 8": "--search is of a device: name it by --device",
    "--search --device h100": "--search and --gpus go together",
    "--gpus 8 --device h100": "--search and --gpus go together",
    "--search --gpus 8 --device h100 --world 8": "--world is of one layout",
    "--stage long": "no stage is called long",
}


@pytest.mark.parametrize("given", REFUSED)
def test_the_command_refuses_in_one_line(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show_estimate, "estimate", lambda *_, **__: pytest.fail("nothing is to be computed"))
    assert _command(*given.split(" "), monkeypatch=monkeypatch) == 2
    told = capsys.readouterr()
    assert REFUSED[given] in told.err and told.err.count("\n") == 1 and not told.out


def test_json_is_of_one_stage_and_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    staged = tmp_path / "staged.yaml"
    shared = f"extends: {QUICKSTART}\ntraining: {{steps: null}}\nschedule: {{warmup_steps: 0}}\n"
    staged.write_text(shared + "stages: [{name: a, steps: 40}, {name: b, steps: 10, parallel: {tp: 2}}]\n")
    monkeypatch.setattr(show_estimate, "estimate", lambda *_, **__: pytest.fail("nothing is to be computed"))
    assert _command("--json", "--device", "h100", monkeypatch=monkeypatch, config=staged) == 2
    assert "--json is of one stage: name it by --stage" in capsys.readouterr().err


def test_the_tables_and_the_json_tell_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show_estimate, "estimate", lambda config, **_: made_estimate(peak=2**31, mesh={"dp_shard": 2}))
    monkeypatch.setattr(show_estimate, "advise", lambda now, device, **_: [])
    monkeypatch.setattr(show_estimate, "roofline", lambda config, found, device: _supposed_bound(config, device))
    given = ("--device", "h100", "--price", "3", "--world", "2")
    assert _command(*given, monkeypatch=monkeypatch) == 0
    table = capsys.readouterr().out
    assert "500 steps" not in table and "250 steps" in table and "It fits: 2.00 of 74.51 GiB" in table
    assert _command(*given, "--json", monkeypatch=monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["roofline"]["seconds"] == 3.0 and told["peak"] == 2**31 and told["fits"] and told["advice"] == []
    assert told["cost"]["price"] == pytest.approx(250 * 3 / 3600 * 2 * 3) and told["device"]["name"] == "h100"
    assert f"price {told['cost']['price']:,.2f}" in table


def _supposed_bound(config: RunConfig, device: Device):  # type: ignore[no-untyped-def]
    times = dict.fromkeys(("recomputation", "backward", "optimizer", "waited", "overlapped", "host"), 0.0)
    return of_times(times | {"forward": 3.0}, config, made_estimate(), device)
