"""What every tokenizer is to the rest: text to ids and back, and the files that are kept with data and checkpoints.

A tokenizer is a SentencePiece model (tokenizer.py) or a Hugging Face tokenizer.json (tokenizer_json.py); which one a
file is, its first byte says. Only this module knows under which names they lie in a folder.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sisa_dist.config import UserError

SENTENCEPIECE, JSON, JSON_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (SENTENCEPIECE, JSON, JSON_CONFIG)

_PROBES = (
    "It is 12 o'clock: a (small) test, said the Fox.",
    "return value",
    "The quick brown fox",
    "a",
    "Na\u00efve 3.14",
)


class Tokenizer(ABC):
    """`model` is the file's bytes; `sha256` tells data made with one tokenizer from data made with another.

    Ids are plain ints from 0 to vocab_size - 1. `eos_id` ends every document; `bos_id` is -1 where there is none.
    """

    path: Path
    model: bytes
    sha256: str
    vocab_size: int
    eos_id: int
    bos_id: int

    @staticmethod
    def load(path: str | Path, *, eos: str | None = None, max_vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer that the file `path` is, or that lies in the folder `path`.

        `eos`: the piece that ends a document, where a tokenizer.json and what lies beside it do not say.
        Raises UserError where it is none, has no eos, or has more ids than `max_vocab_size`.
        """
        from data_pipeline.tokenizer import SentencePieceTokenizer
        from data_pipeline.tokenizer_json import JsonTokenizer, names_beside

        path = Path(path)
        if path.is_dir():
            found = find_tokenizer(path)
            if found is None:
                raise UserError(
                    f"{path}: holds neither {SENTENCEPIECE} nor {JSON}: data gets one by `sisa prepare`, a converted "
                    "model by the conversion's --tokenizer FILE"
                )
            path = found
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: the tokenizer cannot be read ({error.strerror}): mend the path") from None
        tokenizer: Tokenizer
        if is_json(model):
            tokenizer = JsonTokenizer(model, path, names={**names_beside(path), **({"eos": eos} if eos else {})})
        elif eos is not None:
            raise UserError(f"{path}: a SentencePiece model says itself what its eos is: remove data.tokenizer.eos")
        else:
            tokenizer = SentencePieceTokenizer(model, path)
        if max_vocab_size is not None and tokenizer.vocab_size > max_vocab_size:
            raise UserError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} ids and model.vocab_size is {max_vocab_size}: "
                f"set model.vocab_size to {tokenizer.vocab_size}"
            )
        return tokenizer

    @staticmethod
    def of_files(files: Mapping[str, bytes], where: Path) -> Tokenizer | None:
        """The tokenizer among `files`, by name, as `files` gives them; None where there is none."""
        from data_pipeline.tokenizer import SentencePieceTokenizer
        from data_pipeline.tokenizer_json import JsonTokenizer, names_in

        if SENTENCEPIECE in files:
            return SentencePieceTokenizer(files[SENTENCEPIECE], where / SENTENCEPIECE)
        if JSON in files:
            names = names_in(files[JSON_CONFIG], where / JSON_CONFIG) if JSON_CONFIG in files else {}
            return JsonTokenizer(files[JSON], where / JSON, names=names)
        return None

    @property
    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What must lie in a folder for `load` to find this tokenizer there."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """How the vocabulary writes one id."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos. A written "</s>" is ordinary characters, never the eos."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, num_threads: int = -1) -> list[list[int]]:
        """`encode` of each text, on one thread or (-1) on every core the library sees."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bos and eos are silent. Raises ValueError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the tokenizer's 0 … {self.vocab_size - 1}")
        return self._decode(ids)

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def fallback_ids(self) -> set[int]:
        """The ids that stand for one byte, or for what is unknown: text the vocabulary has no piece for."""

    @abstractmethod
    def unknown_id(self) -> int:
        """Of what has no piece and no bytes; -1 where the vocabulary has none."""


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer's file in `folder`: tokenizer.model where there are both."""
    return next((folder / name for name in (SENTENCEPIECE, JSON) if (folder / name).is_file()), None)


def is_json(model: bytes) -> bool:
    return model.lstrip()[:1] == b"{"


def check_text_returns(tokenizer: Tokenizer) -> None:
    """Raises UserError where plain English does not come back from its ids: lower case alone, letters lost.

    Whitespace and Unicode's normal form may change (T5 joins spaces, GPT-NeoX composes accents), and characters that
    the vocabulary does not have may be unknown.
    """
    for probe in _PROBES:
        ids = tokenizer.encode(probe)
        found = tokenizer.decode(ids)
        if tokenizer.unknown_id() not in ids and _plain(found) != _plain(probe):
            raise UserError(
                f"{tokenizer.path}: loses text: {probe!r} comes back as {found!r}: name another in data.tokenizer.path"
            )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of little-endian uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
