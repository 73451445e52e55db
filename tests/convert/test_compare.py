"""What differs between two checkpoints is named, counted and told by the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import compare_checkpoints
import pytest
import torch

from sisa_dist.convert.compare import Difference
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.convert.safetensors_io import SafetensorsFile, write_safetensors
from sisa_dist.convert.tensors import Selected, With


@pytest.fixture
def consolidated(make_checkpoint: Callable[..., Any], tmp_path: Path) -> Path:
    list(convert(plan(make_checkpoint().folder, to="safetensors", moments=True), tmp_path / "a.safetensors"))
    return tmp_path / "a.safetensors"


def edited(path: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = "b.safetensors") -> Path:
    file = SafetensorsFile(path)
    found = {key: file.read(key) for key in file.specs}
    change(found)
    write_safetensors(path.with_name(name), With(Selected(file, ()), found), metadata=file.metadata)
    return path.with_name(name)


def compared(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = compare_checkpoints.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out.splitlines()


def test_equal_in_two_formats(consolidated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = compared(capsys, consolidated.with_name("step_00000007"), consolidated)
    assert code == 0 and len(lines) == 1
    # The padding rows of the embedding and of its two moments are three more.
    assert lines[0].startswith("144 tensors, ") and lines[0].endswith("; 0 tensors differ; the most: 0")


def test_a_number_that_differs_is_measured(consolidated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][5] = 2.0
        tensors["model.norm.weight"][6] = 0.0

    a = edited(consolidated, lambda tensors: tensors["model.norm.weight"].fill_(1.0), "a1.safetensors")
    b = edited(a, change)
    code, lines = compared(capsys, a, b)
    assert code == 1 and lines == [
        "model.norm.weight: abs max 1 mean 0.0625, rel max 1 mean 0.0469, 2 of 32 numbers",
        lines[-1],
    ]
    assert "1 tensors differ; the most: 1" in lines[-1]
    assert compared(capsys, a, b, "--atol", 1)[0] == 0
    assert compared(capsys, a, b, "--atol", 0.99)[0] == 1


def test_moments_are_compared_where_both_have_them(consolidated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = edited(consolidated, lambda tensors: tensors["exp_avg_sq.norm.weight"].add_(1))
    code, lines = compared(capsys, consolidated, other)
    assert code == 1 and lines[0].startswith("exp_avg_sq.norm.weight: abs max 1 ")

    def weights_alone(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("exp")]:
            del tensors[name]

    weights = edited(consolidated, weights_alone, "w.safetensors")
    for pair in ((consolidated, weights), (weights, consolidated)):
        code, lines = compared(capsys, *pair)
        assert code == 0 and len(lines) == 1 and lines[0].startswith("48 tensors, ")


def test_padding_rows_are_told_apart(consolidated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = edited(consolidated, lambda tensors: tensors["model.embed.weight"][300:].zero_())
    code, lines = compared(capsys, consolidated, other)
    assert code == 1 and len(lines) == 2
    assert lines[0].startswith("model.embed.weight[padding]: abs max ") and " of 2,688 numbers" in lines[0]


def test_another_vocab_multiple_is_another_padding_only(
    make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One embedding of 384 rows, one of 300 whose rows are the same."""
    made = make_checkpoint(moments=False)
    list(convert(plan(made.folder, to="safetensors"), tmp_path / "a.safetensors"))

    file = SafetensorsFile(tmp_path / "a.safetensors")
    found = {key: file.read(key) for key in file.specs}
    found["model.embed.weight"] = found["model.embed.weight"][:300].clone()
    config = file.metadata["config.yaml"].replace("vocab_multiple: 128", "vocab_multiple: 1")
    metadata = file.metadata | {"config.yaml": config}
    write_safetensors(tmp_path / "b.safetensors", With(Selected(file, ()), found), metadata=metadata)
    code, lines = compared(capsys, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 1 and len(lines) == 2 and lines[0].startswith("model.embed.weight[padding]: ")


def test_names_and_shapes_and_settings_that_differ_are_listed(
    make_checkpoint: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_checkpoint("a", moments=False)
    b = make_checkpoint("b", moments=False, d_ff=40, tie_embeddings=False, rope_theta=500.0)
    code, lines = compared(capsys, a.folder, b.folder)
    assert code == 1
    assert "config      model.rope_theta: 10000.0 / 500.0" in lines
    assert f"only in {b.folder}: model.head.weight" in lines
    assert "model.blocks.0.mlp.gate.weight: shape [48, 32] / [40, 32]" in lines


@pytest.mark.parametrize(("a", "b", "most"), [(1.0, float("nan"), float("inf")), (float("nan"), float("nan"), 0.0)])
def test_nan_differs_from_numbers_and_not_from_nan(a: float, b: float, most: float) -> None:
    difference = Difference("x")
    difference.add(torch.tensor([a, 1.0]), torch.tensor([b, 1.0]))
    assert difference.max_abs == difference.max_rel == most and difference.unequal == (most > 0)


def test_infinity_equals_itself() -> None:
    difference = Difference("x")
    difference.add(torch.tensor([torch.inf, torch.inf]), torch.tensor([torch.inf, -torch.inf]))
    assert difference.unequal == 1 and difference.max_abs == torch.inf


def test_long_tensors_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sisa_dist.convert.compare._PIECE", 7)
    a, b = torch.randn(5, 10), torch.randn(5, 10)
    difference = Difference("x")
    difference.add(a, b)
    absolute = (a.double() - b.double()).abs()
    relative = absolute / torch.maximum(a.double().abs(), b.double().abs())
    assert difference.max_abs == absolute.max() and difference.max_rel == relative.max()
    assert difference.mean_abs == pytest.approx(absolute.mean().item(), rel=1e-12)
    assert difference.mean_rel == pytest.approx(relative.mean().item(), rel=1e-12) and difference.numbers == 50


def test_what_cannot_be_read_is_exit_code_2(
    consolidated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(capsys, consolidated, tmp_path / "nothing")[0] == 2
    consolidated.with_name("cut.safetensors").write_bytes(consolidated.read_bytes()[:-1])
    assert compare_checkpoints.main([str(consolidated), str(tmp_path / "cut.safetensors")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_folders_of_an_unknown_architecture_are_compared_by_their_own_names(
    tmp_path: Path, toy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
        tensors = {"w": torch.full((2, 2), value)}
        write_safetensors(tmp_path / name / "model.safetensors", With(_Nothing(), tensors), metadata={})
    code, lines = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1 and lines[0].startswith("w: abs max 0.5 mean 0.5, rel max 0.333 ")
    assert compared(capsys, tmp_path / "a", tmp_path / "a") == (
        0,
        ["1 tensors, 4 numbers; 0 tensors differ; the most: 0"],
    )


class _Nothing:
    specs: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(name)
