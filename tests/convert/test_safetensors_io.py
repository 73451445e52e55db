"""Our reader and writer against the library's, and files that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sisa_dist.config import UserError
from sisa_dist.convert.safetensors_io import (
    INDEX,
    SafetensorsFile,
    SafetensorsFiles,
    is_safetensors,
    write_safetensors,
    write_shards,
)
from sisa_dist.convert.tensors import With


class Nothing:
    specs: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(name)


TENSORS = {
    "byte": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7, 3, 1).bfloat16(),
    "single": torch.randn(4, 4),
    "double": torch.randn(2).double(),
    "one number": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    "long": torch.tensor([[-1, 2**40]]),
    "truth": torch.tensor([True, False, True]),
    "eight": torch.randn(9).to(torch.float8_e4m3fn),
}


def _write(path: Path, tensors: dict[str, torch.Tensor] = TENSORS, **metadata: str) -> Path:
    write_safetensors(path, With(Nothing(), tensors), metadata=metadata)
    return path


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.flatten().tolist() == b.flatten().tolist()


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    found = load_file(_write(tmp_path / "a.safetensors"))
    assert found.keys() == TENSORS.keys()
    assert all(_same(found[name], tensor) for name, tensor in TENSORS.items())


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"key": "value"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"key": "value"} and file.specs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert file.specs[name].is_meta and _same(file.read(name), tensor)
        assert file.specs[name].shape == tensor.shape and file.specs[name].dtype == tensor.dtype


def test_every_tensor_starts_at_a_multiple_of_its_element(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


@pytest.mark.parametrize("keep", [0, 5, 60, -1, -4])
def test_a_file_cut_short_is_refused_when_it_is_opened(tmp_path: Path, keep: int) -> None:
    path = _write(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.safetensors: not a whole safetensors file"):
        SafetensorsFile(path)


def _raw(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "why"),
    [
        (b"{not json", 0, "not JSON"),
        ([1], 0, "no mapping"),
        ({"a": GOOD}, 9, "cut short"),  # or something was added
        ({"a": {**GOOD, "shape": [3]}}, 8, "do not agree"),
        ({"a": {**GOOD, "shape": [-2]}}, 8, "do not agree"),
        ({"a": {**GOOD, "dtype": "F13"}}, 8, "not known"),
        ({"a": {**GOOD, "data_offsets": ["x", 8]}}, 8, "not described"),
        ({"a": 5}, 8, "not described"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, 12, "ends at 8"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, 20, "ends at 8"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, 0, "do not agree"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: object, size: int, why: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_raw(header, bytes(size)))
    with pytest.raises(UserError, match=why):
        SafetensorsFile(path)


def test_shards_and_index_are_those_of_transformers(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(10) for number in range(7)}  # 40 bytes each
    write_shards(tmp_path, With(Nothing(), tensors), most=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 280
    assert sorted(set(index["weight_map"].values())) == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    found = SafetensorsFiles.of_folder(tmp_path)
    assert list(found.specs) == list(tensors)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, With(Nothing(), TENSORS), most=10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert SafetensorsFiles.of_folder(tmp_path).specs.keys() == TENSORS.keys()


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, With(Nothing(), {f"t{n}": torch.randn(10) for n in range(4)}), most=100)
    index = json.loads((tmp_path / INDEX).read_text())
    places = index["weight_map"]

    def refused(changed: dict[str, str], why: str) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(UserError, match=why):
            SafetensorsFiles.of_folder(tmp_path)

    refused({**places, "t9": places["t0"]}, "t9 is not in")
    refused({**places, "t0": places["t3"]}, "t0 is not in")
    refused({name: file for name, file in places.items() if name != "t1"}, "does not name t1")
    refused({**places, "t0": "../" + places["t0"]}, "another folder")
    refused(dict.fromkeys(places, "model-00009.safetensors"), "cannot be read")
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        SafetensorsFiles.of_folder(tmp_path)


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, With(Nothing(), TENSORS), metadata={"key": "value ü"}, checksums=True)
    assert all(_same(load_file(path)[name], tensor) for name, tensor in TENSORS.items())
    file, whole = SafetensorsFile(path), path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    for at in range(8, len(whole)):  # every byte of the file but the header's length
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        if at < start:
            with pytest.raises(UserError, match=r"header|whole safetensors file"):
                SafetensorsFile(path)
            continue
        spans = ((name, header[name]["data_offsets"]) for name in TENSORS)
        (damaged,) = (name for name, (low, high) in spans if low <= at - start < high)
        for name in TENSORS:
            if name == damaged:
                with pytest.raises(UserError, match=f"{name} is damaged, its bytes are not those written"):
                    file.read(name)
            else:
                assert _same(file.read(name), TENSORS[name])


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    _write(tmp_path / "no ending")
    (tmp_path / "text").write_text("{} is no header, nor is this")
    (tmp_path / "empty").touch()
    assert is_safetensors(tmp_path / "no ending")
    assert not any(is_safetensors(tmp_path / name) for name in ("text", "empty", "absent", "."))
