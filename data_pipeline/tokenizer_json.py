"""A Hugging Face tokenizer.json as our Tokenizer, by the library tokenizers; needs `pip install 'sisa-dist[hf]'`.

The file does not say which token ends a document: that is read from tokenizer_config.json or special_tokens_map.json
beside it, or guessed from names that mean nothing else, or told (data.tokenizer.eos). What would make encoding depend
on more than the text is turned off: truncation, padding, dropout, tokens added at the ends, and special tokens met in a
text, which are ordinary characters here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer_base import JSON, JSON_CONFIG, Tokenizer
from sisa_dist.config import UserError

# Names by which base models' vocabularies end a document.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")
_SPECIAL_MAP = "special_tokens_map.json"


class JsonTokenizer(Tokenizer):
    """`names`: eos and bos as the vocabulary writes them, where known. `sha256` is of the file and of eos's name."""

    def __init__(self, model: bytes, path: Path, *, names: Mapping[str, str]) -> None:
        self.path, self.model = path, model
        tree = _parse(model, path)
        self.eos, self.bos = names.get("eos") or _guess_eos(tree, path), names.get("bos")
        self._model = _load(tree, path, marks=[name for name in (self.eos, self.bos) if name])
        self.sha256 = hashlib.sha256(model + b"\n" + self.eos.encode()).hexdigest()
        ids = sorted(self._model.get_vocab(with_added_tokens=True).values())
        self.vocab_size = len(ids)
        if ids != list(range(len(ids))):
            gap = next(i for i, found in enumerate(ids) if found != i)
            raise UserError(f"{path}: its ids are not 0, 1, 2, …: {gap} is missing or given twice: name another")
        eos_id = self._model.token_to_id(self.eos)
        if eos_id is None:
            raise UserError(f"{path}: has no token {self.eos!r}, its eos: set data.tokenizer.eos to one it has")
        self.eos_id = int(eos_id)
        bos_id = self._model.token_to_id(self.bos) if self.bos else None
        self.bos_id = -1 if bos_id is None else int(bos_id)
        for mark, i in ((self.eos, self.eos_id), (self.bos, self.bos_id)):
            if mark and i in self.encode(f"a{mark}b {mark}"):
                raise UserError(f"{path}: a text that spells {mark!r} would become that token: name another tokenizer")

    @property
    def files(self) -> dict[str, bytes]:
        names = {"eos_token": self.eos} | ({"bos_token": self.bos} if self.bos_id >= 0 else {})
        return {JSON: self.model, JSON_CONFIG: json.dumps(names, indent=1, ensure_ascii=False).encode()}

    def piece(self, token_id: int) -> str:
        return str(self._model.id_to_token(token_id))

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = -1) -> list[list[int]]:
        if num_threads == 1:  # its batches know only one or all
            return [self._model.encode(text, add_special_tokens=False).ids for text in texts]
        return [found.ids for found in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids, skip_special_tokens=True))

    def fallback_ids(self) -> set[int]:
        """Of a byte-level vocabulary the bytes that no whole character is: those above 0x7f."""
        found = {self._model.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        if found == {None}:
            found = {self._model.token_to_id(mark) for byte, mark in byte_marks().items() if byte > 0x7F}
        return {int(i) for i in found if i is not None} | ({self.unknown_id()} - {-1})

    def unknown_id(self) -> int:
        name = getattr(self._model.model, "unk_token", None)
        i = self._model.token_to_id(name) if name else getattr(self._model.model, "unk_id", None)
        return -1 if i is None else int(i)


def names_beside(path: Path) -> dict[str, str]:
    """eos and bos as the files beside a tokenizer.json name them."""
    names: dict[str, str] = {}
    for name in (_SPECIAL_MAP, JSON_CONFIG):
        beside = path.with_name(name)
        if beside.is_file():
            names |= names_in(beside.read_bytes(), beside)
    return names


def names_in(content: bytes, where: Path) -> dict[str, str]:
    """eos and bos in a tokenizer_config.json or special_tokens_map.json: a string, or a mapping with `content`."""
    tree = _parse(content, where)
    found = {}
    for name in ("eos", "bos"):
        value = tree.get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            found[name] = value
    return found


def byte_marks() -> dict[int, str]:
    """Byte → the character that byte-level vocabularies write it as: itself where it can be seen, else from U+0100."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): use another copy") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: it is no mapping: use another copy")
    return tree


def _guess_eos(tree: Mapping[str, Any], path: Path) -> str:
    added = tree.get("added_tokens")
    contents = {token.get("content") for token in added if isinstance(token, dict)} if isinstance(added, list) else {}
    found = [name for name in _EOS_NAMES if name in contents]
    if len(found) == 1:
        return found[0]
    why = f"it has {' and '.join(found)}" if found else "no added token has a known name"
    raise UserError(
        f"{path}: which token is its eos, which joins documents, is not said ({why}, and there is no {JSON_CONFIG} "
        "beside it): set data.tokenizer.eos"
    )


def _load(tree: dict[str, Any], path: Path, *, marks: list[str]) -> Any:
    """The library's tokenizer, with everything off that is not the text's."""
    try:
        from tokenizers import Tokenizer as Whole
    except ImportError as error:
        raise UserError(f"{path}: needs tokenizers ({error}): pip install 'sisa-dist[hf]'") from None
    tree = {**tree, "truncation": None, "padding": None}
    added = tree.get("added_tokens")
    if isinstance(added, list):
        # An eos that is not marked special would be made of the characters that spell it.
        tree["added_tokens"] = [
            {**token, "special": True} if isinstance(token, dict) and token.get("content") in marks else token
            for token in added
        ]
    try:
        whole = Whole.from_str(json.dumps(tree))
        if getattr(whole.model, "dropout", None) is not None:
            whole.model.dropout = None
    except Exception as error:  # the library raises no narrower one
        raise UserError(f"{path}: not a tokenizer.json ({' '.join(str(error).split())}): name another") from None
    whole.encode_special_tokens = True
    return whole
