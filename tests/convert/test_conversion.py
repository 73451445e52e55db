"""Conversions end to end: to the bit and back, whole or not at all, and wrong ones are found out."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import convert_checkpoint
import pytest
import torch

from runs import tensors
from sisa_dist.checkpoint import load_model, verify
from sisa_dist.checkpoint.storage import SafeReader
from sisa_dist.config import RunConfig, UserError
from sisa_dist.convert import consolidated, conversion, native
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.convert.formats import open_checkpoint
from sisa_dist.convert.recipe import Recipe
from sisa_dist.convert.safetensors_io import SafetensorsFile, write_safetensors
from sisa_dist.convert.tensors import Selected, With


def run(source: Path, destination: Path, *, to: str, how: Any = "auto", **options: Any) -> list[str]:
    return list(convert(plan(source, to=to, **options), destination, how=how))


@pytest.mark.parametrize("part_bytes", [64 << 20, 1000])
def test_there_and_back_to_the_bit(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    made = make_checkpoint()
    monkeypatch.setattr(native, "_PART_BYTES", part_bytes)
    lines = run(made.folder, tmp_path / "a.safetensors", to="safetensors", moments=True)
    assert "141 tensors" in lines[0] and "differ by at most 0," in lines[1]
    run(tmp_path / "a.safetensors", tmp_path / "back", to="native")
    found = tensors(tmp_path / "back")
    assert found.keys() == made.tensors.keys() and len(found) == 141
    assert all(torch.equal(found[name], tensor) for name, tensor in made.tensors.items())
    for name in ("tokenizer.model", "data.json"):
        assert (tmp_path / "back" / name).read_bytes() == (made.folder / name).read_bytes()
    state, was = (json.loads((folder / "state.json").read_text()) for folder in (tmp_path / "back", made.folder))
    assert state == was
    verify(tmp_path / "back")
    parts = SafeReader(tmp_path / "back").read_metadata().state_dict_metadata["model.blocks.0.mlp.gate.weight"].chunks
    assert len(parts) == (1 if part_bytes > 10_000 else 7)  # 48 rows of 128 bytes, 7 to a part
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "back", "step_00000007"]


def test_weights_alone_say_so(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = make_checkpoint()
    run(made.folder, tmp_path / "a.safetensors", to="safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "back", to="native")
    assert json.loads((tmp_path / "back/state.json").read_text())["weights_only"] is True
    assert not any(path.name.startswith("moments") for path in (tmp_path / "back").iterdir())
    assert tensors(tmp_path / "back").keys() == {name for name in made.tensors if name.startswith("model.")}


def test_a_converted_checkpoint_is_a_model_again(
    make_checkpoint: Callable[..., Any], tmp_path: Path, tokenizer: bytes, tiny: RunConfig
) -> None:
    made = make_checkpoint(moments=False)
    too_large = (tiny.data_folder / "tokenizer.model").read_bytes()
    with pytest.raises(UserError, match="512 ids, the model 300"):
        plan(made.folder, to="native", tokenizer=too_large)
    run(made.folder, tmp_path / "back", to="native", tokenizer=tokenizer)
    model, _ = load_model(tmp_path / "back")
    tokens_BT = torch.arange(20)[None]
    assert torch.equal(model(tokens_BT), made.model(tokens_BT))


def test_bf16_rounds_matrices_and_nothing_else(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = make_checkpoint()
    lines = run(made.folder, tmp_path / "a.safetensors", to="safetensors", dtype="bf16", moments=True)
    assert any("before and after rounding" in line for line in lines)
    found = SafetensorsFile(tmp_path / "a.safetensors")
    for name, tensor in made.tensors.items():
        wide = not name.startswith("model.") or any(part in name for part in ("norm", "decay", "importance"))
        wanted = tensor if wide else tensor.bfloat16()
        assert found.specs[name].dtype == wanted.dtype and torch.equal(found.read(name), wanted), name
    run(tmp_path / "a.safetensors", tmp_path / "back", to="native")
    assert {tensor.dtype for tensor in tensors(tmp_path / "back").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"to": "native", "dtype": "bf16"}, "holds fp32 weights"),
        ({"to": "hf", "moments": True}, "holds weights only"),
        ({"to": "safetensors", "moments": True}, "holds none"),
        ({"to": "onnx"}, "no format onnx"),
        ({"to": "native", "format": "hf"}, "config.json"),
    ],
)
def test_what_cannot_be_is_refused(make_checkpoint: Callable[..., Any], options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        plan(make_checkpoint(moments=False).folder, **options)


def test_a_dry_run_reads_headers_and_writes_nothing(
    make_checkpoint: Callable[..., Any],
    tmp_path: Path,
    toy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = make_checkpoint()
    monkeypatch.setattr(native.NativeSource, "read", lambda self, name: pytest.fail(f"{name} was read"))
    before = sorted(tmp_path.rglob("*"))
    assert convert_checkpoint.main([str(made.folder), str(tmp_path / "out"), "--to", "hf", "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out.splitlines()
    (row,) = [line for line in out if line.startswith("x.blocks.1.mixer.wqk.weight ")]
    sources = "model.blocks.1.mixer.wq.weight, model.blocks.1.mixer.wk.weight"
    assert " ".join(row.split()[1:]) == f"[48, 32] float32 ← {sources}"
    assert out[-1].startswith("44 tensors, ") and "nothing was written" in out[-1]


def _edited(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A consolidated file with other tensors."""
    file = SafetensorsFile(path)
    found = {name: file.read(name) for name in file.specs}
    change(found)
    edited = path.with_name("edited.safetensors")
    write_safetensors(edited, With(Selected(file, ()), found), metadata=file.metadata)
    return edited


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("model.blocks.1.norm2.weight"), "model.blocks.1.norm2.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra has no place"),
        (lambda t: t.pop("exp_avg.norm.weight"), "exp_avg.norm.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model.norm.weight is \(31,\)"),
    ],
)
def test_a_tensor_too_few_or_too_many_is_named(
    make_checkpoint: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, torch.Tensor]], None],
    why: str,
) -> None:
    run(make_checkpoint().folder, tmp_path / "a.safetensors", to="safetensors", moments=True)
    edited = _edited(tmp_path / "a.safetensors", change)
    with pytest.raises(UserError, match=why):
        open_checkpoint(edited)
    assert convert_checkpoint.main([str(edited), str(tmp_path / "out"), "--to", "native"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_source_cut_short_or_changed_is_refused(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = make_checkpoint()
    run(made.folder, tmp_path / "a.safetensors", to="safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cut short"):
        plan(tmp_path / "a.safetensors", to="native")
    stored = made.folder / "weights_0.distcp"
    raw = bytearray(stored.read_bytes())
    raw[len(raw) // 2] ^= 1
    stored.write_bytes(raw)
    with pytest.raises(UserError, match="its bytes are not those that were written"):
        run(made.folder, tmp_path / "b.safetensors", to="safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "step_00000007"]


def test_what_is_there_already_stays(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = make_checkpoint()
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        run(made.folder, tmp_path / "there", to="native")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(UserError, match="no such folder"):
        run(made.folder, tmp_path / "nowhere/out", to="native")


@pytest.mark.parametrize("to", ["native", "safetensors", "hf"])
def test_a_disk_that_takes_no_more_leaves_nothing(
    make_checkpoint: Callable[..., Any], tmp_path: Path, toy: ModuleType, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    """A limit on the size of files fails in the middle of a write, as a full disk does."""
    made = make_checkpoint()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        assert convert_checkpoint.main([str(made.folder), str(tmp_path / "out.safetensors"), "--to", to]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line and "File too large" in line
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_too_little_room_is_seen_before_anything_is_written(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_checkpoint()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(native.NativeSource, "read", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(UserError, match="make room"):
        run(made.folder, tmp_path / "out", to="native")


@pytest.mark.parametrize("checksums", [True, False])
def test_a_byte_lost_on_the_way_to_the_disk_is_found(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksums: bool
) -> None:
    made, write = make_checkpoint(), consolidated.write
    if not checksums:  # as in a folder for transformers: what was written is remembered and compared
        without = lambda *given, **named: write_safetensors(*given, **(named | {"checksums": False}))  # noqa: E731
        monkeypatch.setattr(consolidated, "write_safetensors", without)

    def write_and_lose(path: Path, *rest: Any) -> None:
        write(path, *rest)
        raw = bytearray(path.read_bytes())
        raw[-300] ^= 1  # before the tokenizer's 256 bytes
        path.write_bytes(raw)

    monkeypatch.setattr(consolidated, "write", write_and_lose)
    said = "is damaged, its bytes are not" if checksums else "reads back other than it was written"
    with pytest.raises(UserError, match=said):
        run(made.folder, tmp_path / "a.safetensors", to="safetensors", moments=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_what_a_kill_left_behind_is_no_obstacle(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = make_checkpoint()
    killed = tmp_path / ".out.converting.abc.999999999"  # a process that is no more
    mine = tmp_path / ".out.converting.mine.999999999"  # of the same name, and not ours
    for folder in (killed, mine):
        folder.mkdir()
        (folder / "out").write_text("half")
    (killed / conversion._MARK).write_text(socket.gethostname())
    run(made.folder, tmp_path / "out", to="native")
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "out", "step_00000007"]


@pytest.mark.parametrize("shard_bytes", [10_000, 5_000_000_000])
def test_a_foreign_architecture_there_and_back(
    make_checkpoint: Callable[..., Any], tmp_path: Path, toy: ModuleType, shard_bytes: int
) -> None:
    from sisa_dist.convert.opened import Target

    made = make_checkpoint()
    lines = run(
        made.folder, tmp_path / "out", to="hf", how="blocks", target=Target(model_type="toy", shard_bytes=shard_bytes)
    )
    assert "differ by at most 0," in lines[1]
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (shard_bytes == 10_000)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "toy" and config["dtype"] == "float32"
    lines = run(tmp_path / "out", tmp_path / "back", to="native", how="blocks")
    assert any("44 tensors come back" in line for line in lines)
    found = tensors(tmp_path / "back")
    for name, tensor in found.items():
        rows = 300 if name == "model.embed.weight" else None
        assert torch.equal(tensor[:rows], made.tensors[name][:rows])
    assert not found["model.embed.weight"][300:].any()


def _without_swap(module: ModuleType, table: str, name: str, make: Callable[..., torch.Tensor]) -> None:
    right = getattr(module, table)

    def wrong(model: Any) -> dict[str, Recipe]:
        recipes = dict(right(model))
        recipes[name] = Recipe(recipes[name].sources, make)
        return recipes

    setattr(module, table, wrong)


def test_a_wrong_export_recipe_is_caught(
    make_checkpoint: Callable[..., Any], tmp_path: Path, toy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_checkpoint()
    # Heads in another order: shapes are right, nothing is lost, and the model is another one.
    _without_swap(toy, "exports", "x.blocks.1.mixer.wqk.weight", lambda q, k: torch.cat((q.roll(8, 0), k)))
    assert convert_checkpoint.main([str(made.folder), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert "the model written is not the model read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_a_wrong_import_recipe_is_caught(
    make_checkpoint: Callable[..., Any], tmp_path: Path, toy: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_checkpoint()
    run(made.folder, tmp_path / "out", to="hf", how="blocks")
    _without_swap(toy, "imports", "blocks.1.mixer.wk.weight", lambda w: w[32:].roll(8, 0))
    assert convert_checkpoint.main([str(tmp_path / "out"), str(tmp_path / "back"), "--to", "native"]) == 2
    assert "was read one way and would be written another" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step_00000007"]


@pytest.mark.parametrize(("error", "code"), [(0.0, 0), (1e-3, 2)])
def test_the_other_librarys_own_forward_decides(
    make_checkpoint: Callable[..., Any], tmp_path: Path, toy: ModuleType, error: float, code: int
) -> None:
    """Stands in for transformers, which knows no toy: right or a thousandth off."""
    made = make_checkpoint()
    toy.reference_logits = lambda folder, tokens_BT: made.model(tokens_BT).detach() * (1 + error)  # type: ignore
    arguments = [str(made.folder), str(tmp_path / "out"), "--to", "hf", "--verify", "full"]
    assert convert_checkpoint.main(arguments) == code
    assert (tmp_path / "out").exists() == (code == 0)


def test_the_whole_model_is_run_only_where_it_fits(
    make_checkpoint: Callable[..., Any], tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_checkpoint()
    toy.reference_logits = lambda folder, tokens_BT: made.model(tokens_BT).detach()  # type: ignore[attr-defined]
    monkeypatch.setattr("sisa_dist.convert.verify.free_memory", lambda: 100_000)
    assert "half the free memory is 0.0 GB" in run(made.folder, tmp_path / "a", to="hf")[-1]
    monkeypatch.setattr("sisa_dist.convert.verify.free_memory", lambda: 100_000_000)
    assert (
        "the whole model in transformers and of the destination here: they differ"
        in run(made.folder, tmp_path / "b", to="hf")[-1]
    )
    with pytest.raises(UserError, match="--verify full is not possible: no other library"):
        run(made.folder, tmp_path / "c", to="native", how="full")


def test_a_foreign_folder_we_cannot_read_says_why(tmp_path: Path, toy: ModuleType) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mamba9"}')
    with pytest.raises(UserError, match="'mamba9' has no mapping to our models: those known are toy"):
        open_checkpoint(folder)
    ours = {"vocab_size": 4, "d_model": 4, "n_layers": 1, "n_heads": 1, "d_ff": 4, "d_s": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "ours": ours}))
    with pytest.raises(UserError, match="it has no weights"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="its weights are pickled"):
        open_checkpoint(folder)
