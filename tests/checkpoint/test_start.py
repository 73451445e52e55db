"""The two explicit loads, resume and start-from-weights, and the first difference where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.prepare import prepare
from runs import losses, tensors
from sisa_dist.checkpoint import list_checkpoints, read_state
from sisa_dist.config import RunConfig, UserError, parse_config
from sisa_dist.training.trainer import train


def _with(config: RunConfig, folder: Path, **sections: dict[str, Any]) -> RunConfig:
    update: dict[str, Any] = {"output_dir": str(folder)}
    for name, values in sections.items():
        update[name] = getattr(config, name).model_copy(update=values)
    return config.model_copy(update=update)


def test_resume_takes_everything_into_another_folder(tiny: RunConfig, tmp_path: Path) -> None:
    train(tiny, quiet=True)
    branch_point = Path(tiny.output_dir) / "checkpoints" / "step_00000006"
    branch = _with(tiny, tmp_path / "branch", start={"resume": str(branch_point)})
    train(branch, quiet=True)
    assert losses(tmp_path / "branch") == losses(Path(tiny.output_dir))[6:]
    ends = [tensors(list_checkpoints(folder)[-1]) for folder in (Path(tiny.output_dir), tmp_path / "branch")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    train(branch, quiet=True)  # run again, its own checkpoints count, not the one it began from
    assert len(losses(tmp_path / "branch")) == 2


def test_weights_alone_begin_a_new_stage(tiny: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tiny, quiet=True)
    stage = _with(
        tiny,
        tmp_path / "stage",
        start={"weights": tiny.output_dir},
        training={"steps": 3},
        optimizer={"lr": 1e-12, "weight_decay": 0.0},
        model={"rope_theta": 50_000.0, "init_std": 0.5},  # what leaves the parameters alone may change
    )
    train(stage, quiet=True)
    assert "model.rope_theta is 10000.0 there and 50000.0 here: the model computes something else" in caplog.text
    assert "init_std" not in caplog.text
    old, new = (tensors(list_checkpoints(folder)[-1]) for folder in (Path(tiny.output_dir), tmp_path / "stage"))
    for name, tensor in new.items():
        if name.startswith("model."):
            torch.testing.assert_close(tensor, old[name], atol=1e-9, rtol=0)
    state = read_state(list_checkpoints(tmp_path / "stage")[-1])
    assert (state.step, state.cursor) == (3, 12)
    # Moments began at zero: the old ones, decayed for 3 steps, are not in them.
    name = "exp_avg_sq.norm.weight"
    assert not torch.allclose(new[name], old[name] * 0.95**3, rtol=0.2)
    same_digests = [r[3] for r in losses(tmp_path / "stage")] == [r[3] for r in losses(Path(tiny.output_dir))][:3]
    assert same_digests


def test_another_model_tokenizer_or_data_set_is_named(tiny: RunConfig, tmp_path: Path) -> None:
    train(tiny, quiet=True)
    run = tiny.output_dir

    def refused(said: str, *, start: dict[str, str], accept: bool = True, **sections: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=said) as caught:
            train(_with(tiny, tmp_path / "new", start=start, **sections), accept_changes=accept, quiet=True)
        assert "\n" not in str(caught.value)
        assert not list_checkpoints(tmp_path / "new")

    for start in ({"resume": run}, {"weights": run}):
        refused(r"another model: its model\.d_ff is 48, the config says 64", start=start, model={"d_ff": 64})
    for section, change in (("model", {"rope_theta": 7.0}), ("optimizer", {"lr": 1e-5})):
        (key,) = change
        said = rf"started with {section}\.{key}=.*: set it as it was there, or"
        refused(said, start={"resume": run}, accept=False, **{section: change})
    refused(r"order\.lanes is 3 there, 4 here", start={"resume": run}, data={"lanes": 4})
    text = tmp_path / "other.txt"
    text.write_text("\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))))
    other = {"input": str(text), "folder": str(tmp_path / "data")}
    own = _with(tiny, tmp_path / "prepared", data=other)
    prepare(own, quiet=True)
    refused(r"another tokenizer than .*: id \d+ is '.*' there, '.*' here", start={"weights": run}, data=other)
    same = other | {
        "folder": str(tmp_path / "same"),
        "tokenizer": tiny.data.tokenizer.model_copy(update={"path": f"{tiny.data.folder}/tokenizer.model"}),
    }
    prepare(_with(tiny, tmp_path / "prepared", data=same), quiet=True)
    refused(r"not the data it was trained on: documents is \d+ there, 1 here", start={"resume": run}, data=same)
    train(_with(tiny, tmp_path / "stage", start={"weights": run}, data=same), quiet=True)
    with pytest.raises(UserError, match="no checkpoint here"):
        train(_with(tiny, tmp_path / "x", start={"weights": str(tmp_path)}), quiet=True)


def test_speed_and_defaults_of_a_section_make_no_other_model(tiny: RunConfig, tmp_path: Path) -> None:
    """And of what does the key is named, not the section."""

    def run(name: str, *, start: bool = True, **ssm: int) -> None:
        tree = tiny.model_dump()
        tree["model"] |= {"mixer": "mamba2", "d_s": None, "ssm": {"d_state": 8, "head_dim": 8} | ssm}
        tree["training"]["steps"] = 2
        tree |= {"output_dir": str(tmp_path / name), "start": {"weights": str(tmp_path / "first") if start else None}}
        train(parse_config(tree, source=name), quiet=True)

    run("first", start=False)
    run("chunks", chunk=16)
    run("default", conv=4)
    with pytest.raises(UserError, match=r"its model\.ssm\.d_state is 8, the config says 16"):
        run("other", d_state=16)
