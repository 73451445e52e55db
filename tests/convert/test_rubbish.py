"""What lies beside the tensors is rubbish: one line that names it, and nothing is passed on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import torch

from sisa_dist.checkpoint import find_checkpoint
from sisa_dist.checkpoint.manifest import hash_file, read_manifest, write_manifest
from sisa_dist.config import UserError
from sisa_dist.convert.formats import architecture, detect, open_checkpoint
from sisa_dist.convert.safetensors_io import SafetensorsFile, write_safetensors
from sisa_dist.convert.tensors import Selected, With

STATE = {"step": 7, "cursor": 21, "tokens": 1000, "seconds": 2.5, "fingerprint": "abc"}
STATES = [
    b"", b"{", b"[]", b"\xff", b"{}", json.dumps(STATE | {"step": "abc"}).encode(),
    json.dumps(STATE | {"step": -1}).encode(), json.dumps(STATE | {"step": True}).encode(),
    json.dumps(STATE | {"guard": 3}).encode(), json.dumps(STATE | {"more": 3}).encode(),
]  # fmt: skip


def refused(said: str, capsys: pytest.CaptureFixture[str], *arguments: Any) -> None:
    capsys.readouterr()
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    write_manifest(checkpoint, read_manifest(checkpoint) | {name: hash_file(checkpoint / name)})


@pytest.mark.parametrize("content", STATES)
@pytest.mark.parametrize("to", ["safetensors", "deepspeed"])
def test_a_state_that_is_none_goes_nowhere(
    make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, to: str
) -> None:
    made = make_checkpoint(moments=False)
    forge(made.folder, "state.json", content)
    refused("state.json: cannot be read (", capsys, made.folder, tmp_path / "out.safetensors", "--to", to)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"fingerprint": 3}', b"\xff"])
def test_data_without_a_fingerprint_goes_nowhere(
    make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    made = make_checkpoint(moments=False)
    forge(made.folder, "data.json", content)
    refused(
        "data.json: no mapping with a fingerprint", capsys, made.folder, tmp_path / "o.safetensors", "--to",
        "safetensors",
    )  # fmt: skip


def test_deepspeed_folders_of_rubbish(
    make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    made, ds = make_checkpoint(moments=False), tmp_path / "ds"
    assert convert_checkpoint.main([str(made.folder), str(ds), "--to", "deepspeed"]) == 0
    whole = (ds / "sisa" / "state.json").read_bytes()
    for content in STATES:
        (ds / "sisa" / "state.json").write_bytes(content)
        refused("state.json: cannot be read (", capsys, ds, tmp_path / "out", "--to", "native")
    (ds / "sisa" / "state.json").write_bytes(whole)
    (ds / "latest").write_bytes(b"global_step7\xff")
    refused("latest: does not name a folder", capsys, ds, tmp_path / "out", "--to", "native")


def test_a_tokenizer_of_another_dtype_is_none(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert convert_checkpoint.main([str(make_checkpoint(moments=False).folder), str(path), "--to", "safetensors"]) == 0
    file = SafetensorsFile(path)
    found = {name: file.read(name) for name in file.specs}
    found["tokenizer.model"] = found["tokenizer.model"].float()
    edited = tmp_path / "b.safetensors"
    write_safetensors(edited, With(Selected(file, ()), found), metadata=file.metadata)
    with pytest.raises(UserError, match=r"its tokenizer\.model is float32, not the uint8"):
        open_checkpoint(edited)


@pytest.mark.parametrize("model_type", [["llama"], {"a": 1}, 3, None])
def test_a_model_type_of_another_kind_has_no_mapping(model_type: Any) -> None:
    with pytest.raises(UserError, match="has no mapping to our models"):
        architecture(model_type)


def test_other_formats_are_told_the_way_in(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = make_checkpoint(moments=False, mixer="attention", d_s=None, vocab_multiple=1)
    for name, to in (("a.safetensors", "safetensors"), ("hf", "hf")):
        assert convert_checkpoint.main([str(made.folder), str(tmp_path / name), "--to", to]) == 0
        with pytest.raises(UserError, match=r"a checkpoint of another format: .* --to native makes"):
            find_checkpoint(tmp_path / name)
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "latest").write_text("global_step7")
    with pytest.raises(UserError, match="--to native makes"):
        find_checkpoint(tmp_path / "ds")
    with pytest.raises(UserError, match="no checkpoint here"):
        find_checkpoint(tmp_path)
    assert torch.equal(
        *[open_checkpoint(tmp_path / name).source.read("model.norm.weight") for name in ("a.safetensors", "hf")]
    )


def test_a_safetensors_file_has_its_ending_and_a_flipped_byte_is_named(
    make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, path = make_checkpoint(), tmp_path / "a.safetensors"
    refused("name it a.bin.safetensors", capsys, made.folder, tmp_path / "a.bin", "--to", "safetensors")
    assert sorted(found.name for found in tmp_path.iterdir()) == [made.folder.name]
    assert convert_checkpoint.main([str(made.folder), str(path), "--to", "safetensors"]) == 0
    assert detect(path.rename(tmp_path / "b")) == "safetensors"
    content = bytearray((tmp_path / "b").read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)
    refused("is damaged, its bytes are not those written", capsys, path, tmp_path / "out", "--to", "native")
    assert not (tmp_path / "out").exists()
    content[content.index(b"rope_theta") + 12] ^= 1  # in config.yaml
    path.write_bytes(content)
    refused("its header is damaged", capsys, path, tmp_path / "out", "--to", "native")
