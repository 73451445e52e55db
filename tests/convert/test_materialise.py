"""Learned d_s made fixed: the same logits, fewer channels, wider MLPs where asked, one clear line for the rest."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sisa_dist.checkpoint import load_model, write_checkpoint
from sisa_dist.config import UserError, parse_config
from sisa_dist.convert.conversion import plan
from sisa_dist.model import LM, build_model, num_parameters

_SPEC = importlib.util.spec_from_file_location("materialize_ds", Path(__file__).parents[2] / "tools/materialize_ds.py")
assert _SPEC is not None and _SPEC.loader is not None
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)

# Rows are the layers that have d_s: nothing open; two pairs, so two of padding; five, of twelve.
OPEN = [[], [1, 6], [0, 2, 3, 7, 11]]
MODEL: dict[str, Any] = {
    **{"vocab_size": 300, "d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "init_std": 0.2},
    **{"mixer": ["sisa", "sisa", "attention", "sisa"], "d_s": {"learned": True, "max": 24, "budget": 6.0}},
}
Make = Callable[..., tuple[Path, LM]]


@pytest.fixture
def make(tmp_path: Path, tokenizer: bytes) -> Make:
    """make(share, **model): a checkpoint whose gates are OPEN, hard (share 1), or with values between (share 0, and a
    penalty: under a budget every gate would still be open)."""

    def checkpoint(share: float = 1.0, **settings: Any) -> tuple[Path, LM]:
        training = {"steps": 1000, "seq_len": 64, "global_batch_tokens": 64}
        soft = {} if share else {"d_s": {"learned": True, "max": 24, "penalty": 1.0}}
        config = parse_config({"model": MODEL | soft | settings, "training": training}, source="test")
        model = build_model(config.model, seed=3)
        if model.gates is not None:
            with torch.no_grad():
                model.gates.log_alpha.copy_(-3 - torch.rand(model.gates.log_alpha.shape))
                for row, pairs in zip(model.gates.log_alpha, OPEN, strict=False):
                    row[pairs] = torch.linspace(0.5, 4, len(pairs))
                model.gates.share.fill_(share)
        tensors = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
        state = {"step": 7, "cursor": 21, "tokens": 1000, "seconds": 2.5, "fingerprint": "abc", "weights_only": True}
        files = {"config.yaml": json.dumps(config.model_dump()).encode(), "state.json": json.dumps(state).encode()}
        files["tokenizer.model"] = tokenizer
        write_checkpoint(tmp_path / "learned", tensors, files=files, no_dist=True)
        return tmp_path / "learned", model

    return checkpoint


def tokens() -> Tensor:
    return torch.randint(0, 300, (2, 70), generator=torch.Generator().manual_seed(0))


def logits(model: LM) -> Tensor:
    with torch.no_grad():
        return model(tokens())


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("to_mlp", [False, True])
def test_logits_are_those_of_the_gated_model(make: Make, tmp_path: Path, share: float, to_mlp: bool) -> None:
    """Hard gates and gates on the way. Layers are of other widths: fp32 adds up in another order, up to 1e-6."""
    source, gated = make(share)
    if share == 1.0:  # as many as the budget has: 3 layers of 6 channels, 9 pairs, of which 7 are those of OPEN
        assert gated.gates is not None and gated.gates.values().sum() == 9
    arguments = [str(source), str(tmp_path / "fixed"), *(["--to-mlp"] if to_mlp else [])]
    assert tool.main(arguments) == 0
    fixed, _ = load_model(tmp_path / "fixed")
    assert fixed.gates is None and (logits(fixed) - logits(gated)).abs().max() < 1e-5
    assert logits(gated).std() > 0.3
    before, after = num_parameters(gated) - 3 * 12, num_parameters(fixed)
    step = 8 * 4 * 3 * 32  # of the MLPs by eight columns
    if to_mlp:
        assert fixed.config.d_ff > 48 and before - step < after <= before
        assert not fixed.blocks[0].mlp.down.weight[:, 48:].any()  # type: ignore[union-attr, index]
        assert fixed.blocks[0].mlp.gate.weight[48:].std() > 0.1  # type: ignore[union-attr, index]
    else:
        assert fixed.config.d_ff == 48 and after < before - step


def test_d_s_is_what_is_open_rounded_up_to_eight(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = make(0.0)
    assert tool.main([str(source), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "layer 0: 0 of 24 channels are open: d_s 0" in said and "layer 3: 10 of 24 channels are open: d_s 16" in said
    new = plan(source, to="native", materialise="cut").intended.model
    assert new.layer_mixers == ["attention", "sisa", "attention", "sisa"] and new.layer_d_s == [0, 8, 0, 16]
    assert not list(source.parent.glob("fixed*"))


def test_padding_adds_nothing_and_can_learn(make: Make, tmp_path: Path) -> None:
    source, _ = make(0.0)
    assert tool.main([str(source), str(tmp_path / "fixed")]) == 0
    fixed, _ = load_model(tmp_path / "fixed")
    wb_HSD = fixed.blocks[1].mixer.wb.weight.view(2, 8, 32)  # type: ignore[union-attr, operator]
    assert (wb_HSD.abs().amax((0, 2)) > 0).sum() == 4
    loss, count = fixed(tokens(), tokens().roll(-1, 1))
    (loss / count).backward()
    gradient = fixed.blocks[1].mixer.wb.weight.grad.view(2, 8, 32)  # type: ignore[union-attr, operator]
    assert (gradient.abs().amax((0, 2)) > 0).all()


def test_other_models_keep_their_form(make: Make, tmp_path: Path) -> None:
    """SISA-2 has no attention to become; a control without rotation no W_θ."""
    settings: dict[str, Any] = {"mixer": "sigmoid_sisa", "n_layers": 3, "sisa": {"rotation": False}}
    source, gated = make(0.0, **settings)
    assert tool.main([str(source), str(tmp_path / "fixed")]) == 0
    fixed, _ = load_model(tmp_path / "fixed")
    assert fixed.config.layer_d_s == [8, 8, 16] and set(fixed.config.layer_mixers) == {"sigmoid_sisa"}
    assert (logits(fixed) - logits(gated)).abs().max() < 1e-5


def test_what_is_saved_widens_dense_mlps_and_no_expert(make: Make, tmp_path: Path) -> None:
    """Whether the experts' width is d_ff or their own."""
    settings: dict[str, Any] = {"mlp": ["moe", "swiglu", "moe", "gelu"], "ffn": "parallel"}
    for number, own in enumerate(({}, {"d_ff": 16})):
        source, gated = make(0.0, **settings, moe={"experts": 4, "shared": 1, **own})
        assert tool.main([str(source), str(tmp_path / f"fixed{number}"), "--to-mlp"]) == 0
        fixed, _ = load_model(tmp_path / f"fixed{number}")
        assert fixed.config.d_ff > 48 and fixed.config.expert_d_ff == gated.config.expert_d_ff
        assert (logits(fixed) - logits(gated)).abs().max() < 1e-5
        shutil.rmtree(source)


def test_nothing_open_at_all_is_a_transformer(make: Make, tmp_path: Path) -> None:
    source, gated = make(0.0, mixer="sisa", n_layers=1, log_alpha_min=-1.0)
    assert tool.main([str(source), str(tmp_path / "fixed"), "--to-mlp"]) == 0
    fixed, _ = load_model(tmp_path / "fixed")
    assert fixed.config.mixer == "attention" and fixed.config.d_s is None and fixed.config.d_ff > 48
    assert (logits(fixed) - logits(gated)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({"d_s": [8, 8, 0, 8]}, [], "not learned: there are no gates to materialise"),
        ({"mlp": "none", "d_ff": 0}, ["--to-mlp"], "--to-mlp: no layer .* has an MLP of its own to widen"),
    ],
)
def test_what_cannot_be_is_one_line(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Any, options: list[str], says: str
) -> None:
    source, _ = make(**settings)
    assert tool.main([str(source), str(tmp_path / "fixed"), *options]) == 2
    said = capsys.readouterr().err
    assert re.search(f"^materialize_ds: .*{says}", said) and said.count("\n") == 1
    assert not (tmp_path / "fixed").exists()


def test_a_missing_place_and_a_missing_checkpoint_are_one_line(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = make()
    assert tool.main([str(source)]) == 2 and "DST is missing" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "nowhere"), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_export_to_hugging_face_asks_for_it(make: Make) -> None:
    with pytest.raises(UserError, match=r"materialize_ds"):
        plan(make()[0], to="hf")
