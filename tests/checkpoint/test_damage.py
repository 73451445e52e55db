"""A checkpoint that is not what was written: one line, the one before it, the same bits in the end. And no pickles."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import sisa_dist
from runs import assert_same_tensors, losses
from sisa_dist.checkpoint import Damaged, list_checkpoints, verify
from sisa_dist.checkpoint.manifest import NAME, hash_file, read_manifest, write_manifest
from sisa_dist.checkpoint.storage import METADATA, SafeReader
from sisa_dist.config import RunConfig, UserError
from sisa_dist.convert.native import NativeSource
from sisa_dist.training.trainer import train


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = ["weights_0.distcp", "moments_0.distcp", METADATA, "config.yaml", "tokenizer.model", "data.json", "state.json"]
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (_flip, "its bytes are not those that were written"),
    "cut": (_cut, "were written: it is damaged"),
    "missing": (Path.unlink, "No such file"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_every_file_is_watched(tiny: RunConfig, tmp_path: Path, how: str) -> None:
    train(tiny, quiet=True)
    whole = list_checkpoints(Path(tiny.output_dir))[-1]
    assert sorted([*FILES, NAME]) == sorted(p.name for p in whole.iterdir())
    verify(whole)
    harm, said = DAMAGE[how]
    for name in FILES:
        broken = tmp_path / how / name / whole.name
        shutil.copytree(whole, broken)
        harm(broken / name)
        with pytest.raises(Damaged, match=said) as caught:
            verify(broken)
        assert str(broken / name) in str(caught.value) and "\n" not in str(caught.value)
        if name == "moments_0.distcp":
            sisa_dist.load_model(broken)  # needs the weights alone, and looks at no more
        else:
            with pytest.raises(Damaged):
                sisa_dist.load_model(broken)


PATH = b'{"format": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}}'


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1, "files": {"a": 3}}', PATH])
def test_a_broken_manifest_is_damage(tiny: RunConfig, content: bytes) -> None:
    train(tiny, quiet=True)
    checkpoint = list_checkpoints(Path(tiny.output_dir))[-1]
    (checkpoint / NAME).write_bytes(content)
    with pytest.raises(Damaged, match=r"manifest\.json: (cannot be read|'../a' is no file's name)"):
        verify(checkpoint)
    write_manifest(checkpoint, {})  # one that lists nothing has nothing to find fault with
    with pytest.raises(UserError, match="is not in the manifest"):
        sisa_dist.load_model(checkpoint)


def test_a_newer_format_is_no_damage(tiny: RunConfig) -> None:
    train(tiny, quiet=True)
    manifest = list_checkpoints(Path(tiny.output_dir))[-1] / NAME
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2, this version reads 1") as caught:
        train(tiny, quiet=True)
    assert not isinstance(caught.value, Damaged) and manifest.exists()


def test_a_run_falls_back_to_the_checkpoint_before_and_ends_with_the_same_bits(
    tiny: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = tiny.model_copy(update={"output_dir": str(tmp_path / "straight")})
    train(straight, quiet=True)
    train(tiny, quiet=True)
    run = Path(tiny.output_dir)
    first, last = list_checkpoints(run)
    assert (first.name, last.name) == ("step_00000006", "step_00000008")
    _flip(last / "weights_0.distcp")
    train(tiny, quiet=True)
    assert f"{last / 'weights_0.distcp'}: its bytes are not" in caplog.text
    assert "set aside as step_00000008.damaged" in caplog.text
    assert [p.name for p in list_checkpoints(run)] == [first.name, last.name]
    assert (last.parent / "step_00000008.damaged").is_dir()
    assert losses(run) == losses(tmp_path / "straight")
    assert_same_tensors(last, list_checkpoints(tmp_path / "straight")[-1])


def test_where_none_is_whole_nothing_starts_anew_in_silence(tiny: RunConfig) -> None:
    train(tiny, quiet=True)
    run = Path(tiny.output_dir)
    for checkpoint in list_checkpoints(run):
        _cut(checkpoint / "state.json")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="none of 2 checkpoints is whole"):
        train(tiny, quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(list((run / "checkpoints").glob("*.damaged"))) == 2


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_nothing_foreign_is_unpickled(tiny: RunConfig, tmp_path: Path) -> None:
    train(tiny, quiet=True)
    checkpoint = list_checkpoints(Path(tiny.output_dir))[-1]
    whole = (checkpoint / METADATA).read_bytes()
    fell = tmp_path / "fell"
    stock = dcp.FileSystemReader(checkpoint)
    hidden = stock.read_metadata()  # PyTorch's reader reads what we write
    hidden.planner_data = _Bomb(fell)
    tensors = dict(hidden.state_dict_metadata)
    bytes_entry = pickle.loads(whole)
    bytes_entry.state_dict_metadata["model.norm.weight"] = dcp.metadata.BytesStorageMetadata()
    for content in (pickle.dumps(_Bomb(fell)), pickle.dumps(hidden), pickle.dumps(tensors), pickle.dumps(bytes_entry)):
        (checkpoint / METADATA).write_bytes(content)
        files = read_manifest(checkpoint)
        write_manifest(checkpoint, files | {METADATA: hash_file(checkpoint / METADATA)})  # whoever forges, forges this
        with pytest.raises(Damaged, match=r"\.metadata: (not a table of tensors|model.norm.weight is not a tensor)"):
            sisa_dist.load_model(checkpoint)
        assert not fell.exists()
    (checkpoint / METADATA).write_bytes(pickle.dumps(_Bomb(fell)))
    with suppress(AttributeError):  # what it makes is no table
        stock.read_metadata()
    assert fell.exists(), "the bomb is real"
    (checkpoint / METADATA).write_bytes(whole)
    assert SafeReader(checkpoint).read_metadata().state_dict_metadata.keys() == tensors.keys()


def test_a_forged_part_is_refused_in_our_words(tiny: RunConfig, tmp_path: Path) -> None:
    train(tiny, quiet=True)
    checkpoint = list_checkpoints(Path(tiny.output_dir))[-1]
    table = SafeReader(checkpoint).read_metadata()
    fell, forged = tmp_path / "fell", checkpoint / "weights_0.distcp"
    for content in (_Bomb(fell), "a text"):
        torch.save(content, forged)
        for index, info in table.storage_data.items():
            table.storage_data[index] = replace(info, offset=0, length=forged.stat().st_size)
        (checkpoint / METADATA).write_bytes(pickle.dumps(table))
        files = read_manifest(checkpoint)
        write_manifest(checkpoint, files | {name: hash_file(checkpoint / name) for name in (METADATA, forged.name)})
        for load in (sisa_dist.load_model, lambda folder: NativeSource(folder).read("model.norm.weight")):
            with pytest.raises(UserError) as caught:
                load(checkpoint)
            said = str(caught.value)
            assert "weights_0.distcp holds something else than tensors, which is not unpickled" in said
            assert "weights_only" not in said and "\n" not in said
        assert not fell.exists()


def test_a_table_of_contents_is_looked_at_before_anything_is_read(tiny: RunConfig, capfd: Any) -> None:
    """DCP itself says `metadata is None` and prints a traceback."""
    train(tiny, quiet=True)
    checkpoint = list_checkpoints(Path(tiny.output_dir))[-1]
    (checkpoint / METADATA).write_bytes(pickle.dumps(3))
    write_manifest(checkpoint, read_manifest(checkpoint) | {METADATA: hash_file(checkpoint / METADATA)})
    capfd.readouterr()
    with pytest.raises(Damaged, match="not a table of tensors: use another checkpoint"):
        verify(checkpoint)
    assert capfd.readouterr().err == ""
