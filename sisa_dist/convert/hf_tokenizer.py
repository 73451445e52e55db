"""A SentencePiece model as a tokenizer that `AutoTokenizer` loads, with the same ids, or not at all.

Its vocabulary spells a space as a space, where SentencePiece writes "▁": so a literal "▁" is no piece and falls to
bytes, as `data_pipeline.Tokenizer` has it, and a text needs no pre-tokenizer and no normalizer unless the model itself
normalizes. BOS and EOS are never added, and a written "</s>" is ordinary characters, as in training.

The two libraries are not the same program (of a BPE piece made in two ways SentencePiece takes the leftmost), hence
`check`, run on every conversion: better no tokenizer.json than a wrong one. A unigram model may cut a text in two ways
of one score ("====" as 1+3 or 3+1); which it takes is then a matter of rounding, float32 there and float64 here, and
such a difference is let pass. Measured with a model of 6000 pieces: 3 of 60 whole PEPs of 2 to 50 kB hold one.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.tokenizer import SentencePieceTokenizer, Tokenizer
from sisa_dist.config import UserError

_MARK = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of pieces
_UNIGRAM, _BPE = 1, 2
_NEVER = -1e9  # score of a piece that no text may match


class NoEqualTokenizer(UserError):
    """The SentencePiece model is sound, but tokenizers cannot do as it does."""


class Piece(NamedTuple):
    text: str  # with spaces
    score: float
    type: int


_CHECKED_TEXTS = [
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "\n",
    "\n\n\n\n\n",
    "\t\t\t\t\t\tx",
    "def f(x):\n\tif x:\n\t\treturn  1\n\n\n\n\n        # é\n",
    "for i in range(10):\r\n    print(i, end='')\r\n",
    "a\rb\u2028c\x0b\x0cd\x00e\x7f",
    "😀👩‍👩‍👧‍👦🇩🇪 e\u0301 é \u200b\ufeff \u3000\u00a0x",
    "Füße, naïve, 東京, Здравствуйте, नमस्ते, مرحبا",
    "</s><s><unk><pad><0x41><0xE2>",
    "\u2581",
    "a\u2581b c\u2581\u2581 \u2581",
    "1234567890.00 3.14e-10 0xFF",
    "It's the 1st of the month; isn't it? \"Yes,\" she said… — no.",
    "https://example.org/a_b?c=d&e=%20f#g",
    "=" * 70 + "\n" + "-" * 33 + "." * 17 + " " * 41 + "aaaaaaaaaaa" + "abababababa",
]


def hf_tokenizer(model: bytes, *, begins_with_eos: bool = False) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a SentencePiece model (the content of a tokenizer.model).

    `begins_with_eos`: eos is named as bos too, because in training a document begins after one and bos never occurs.
    Raises NoEqualTokenizer, with what differs, where the ids of some text would, UserError for what is no such model.
    """
    sentencepiece_model: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = sentencepiece_model.ModelProto()
    ours = SentencePieceTokenizer(model, Path("tokenizer.model"))
    proto.ParseFromString(model)
    pieces = pieces_of(proto)
    whole = _build(proto, pieces)
    check(ours, whole, pieces, unigram=proto.trainer_spec.model_type == _UNIGRAM)
    return {"tokenizer.json": whole.to_str().encode(), "tokenizer_config.json": _config(proto, pieces, begins_with_eos)}


def pieces_of(proto: Any) -> list[Piece]:
    return [Piece(piece.piece.replace(_MARK, " "), piece.score, piece.type) for piece in proto.pieces]


def check(ours: Tokenizer, theirs: Any, pieces: list[Piece], *, unigram: bool) -> None:
    """Compare ids and decoded text on fixed texts and on what the pieces spell. `theirs`: a tokenizers.Tokenizer."""
    scores = [score for _, score in _scores(pieces)] if unigram else []
    texts = list(_texts(pieces))
    both = zip(ours.encode_batch(texts), theirs.encode_batch(texts, add_special_tokens=False), strict=True)
    for text, (ids, encoding) in zip(texts, both, strict=True):
        found = encoding.ids
        if found != ids and not (unigram and _tied(ids, found, scores)):
            raise NoEqualTokenizer(
                f"no equal tokenizer.json can be made of this SentencePiece model: {_clip(text)} is {_clip(ids)} and "
                f"would be {_clip(found)}: use its tokenizer.model through sentencepiece"
            )
        lossless = all(pieces[i].type != _UNKNOWN for i in ids)
        if lossless and not theirs.decode(found) == theirs.decode(ids) == ours.decode(ids):
            raise NoEqualTokenizer(
                f"no equal tokenizer.json can be made of this SentencePiece model: {_clip(ids)} is "
                f"{_clip(ours.decode(ids))} and would be {_clip(theirs.decode(ids))}: use its tokenizer.model through "
                "sentencepiece"
            )


def _tied(ids: list[int], found: list[int], scores: list[float]) -> bool:
    """Whether two ways to cut a text differ in score by no more than float32's rounding of the sum."""
    one, two = (sum(scores[i] for i in way) for way in (ids, found))
    return abs(one - two) <= 1e-5 * abs(one)


def _texts(pieces: list[Piece]) -> Iterator[str]:
    yield from _CHECKED_TEXTS
    words = [piece.text for piece in pieces]
    yield from words
    # Neighbours in the vocabulary side by side: pieces that overlap are where ties are.
    for start in range(0, len(words), 50):
        yield "".join(words[start : start + 50])
        yield " ".join(words[start : start + 50])


def _build(proto: Any, pieces: list[Piece]) -> Any:
    """A tokenizers.Tokenizer that should do what the model does."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Whole

    kind, spec = proto.trainer_spec.model_type, proto.normalizer_spec
    if proto.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise NoEqualTokenizer(
            "this SentencePiece model treats spaces in its own way: only its tokenizer.model can be kept"
        )
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    by_bytes = any(type_ == _BYTE for _, _, type_ in pieces)
    if kind == _BPE:
        core: Any = models.BPE(
            vocab={text: i for i, (text, _, _) in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=by_bytes,
        )
    elif kind == _UNIGRAM:
        core = models.Unigram(_scores(pieces), unk_id=unknown, byte_fallback=by_bytes)
    else:
        raise NoEqualTokenizer(
            "this SentencePiece model splits by words or characters: only its tokenizer.model can be kept"
        )
    whole = Whole(core)

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if not by_bytes or spec.add_dummy_prefix:  # where data_pipeline.Tokenizer spells a literal mark in bytes, else not
        steps.append(normalizers.Replace(_MARK, " "))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if steps:
        whole.normalizer = normalizers.Sequence(steps)
    if kind == _UNIGRAM and (guard := _reserved_pattern(pieces)) is not None:
        whole.pre_tokenizer = pre_tokenizers.Split(guard, "merged_with_previous")
    after = [decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        after.append(decoders.Strip(" ", 1, 0))
    whole.decoder = decoders.Sequence(after)
    if kind == _BPE:
        user_defined = [text for text, _, type_ in pieces if type_ == _USER_DEFINED]
        whole.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    whole.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text, _, type_ in pieces if type_ in (_UNKNOWN, _CONTROL)]
    )
    whole.encode_special_tokens = True
    return whole


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best piece first; of one piece the longest left part first."""
    usable = {text for text, _, type_ in pieces if type_ in (_NORMAL, _USER_DEFINED)}
    made = sorted(((score, text) for text, score, type_ in pieces if type_ == _NORMAL), key=lambda x: -x[0])
    return [
        (text[:cut], text[cut:])
        for _, text in made
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in usable and text[cut:] in usable
    ]


def _scores(pieces: list[Piece]) -> list[tuple[str, float]]:
    """SentencePiece's own rule for user-defined pieces: a bonus that makes them always win."""
    best = max(score for _, score, type_ in pieces if type_ == _NORMAL)
    bonus = {piece.text: len(piece.text.encode()) * best - 0.1 for piece in pieces if piece.type == _USER_DEFINED}
    return [(text, score if type_ == _NORMAL else bonus.get(text, _NEVER)) for text, score, type_ in pieces]


def _reserved_pattern(pieces: list[Piece]) -> Any:
    """Where to cut a text that reads like a reserved piece: unlike SentencePiece, tokenizers would take it for one.

    The cut lies between two characters that no piece spans, and of which not both are unknown (a run of unknown
    characters is one id), so that it changes nothing else.
    """
    from tokenizers import Regex

    normal = [text for text, _, type_ in pieces if type_ in (_NORMAL, _USER_DEFINED)]
    known = set(normal)
    spanned = {text[i : i + 2] for text in normal for i in range(len(text) - 1)}
    cuts = []
    for reserved in (text for text, _, type_ in pieces if type_ in (_UNKNOWN, _CONTROL, _BYTE, _UNUSED)):

        def cost(cut: int, text: str = reserved) -> int:
            pair = text[cut - 1 : cut + 1]
            return 2 * (pair in spanned) + (pair[0] not in known and pair[1] not in known)

        if len(reserved) > 1:
            cut = min(range(1, len(reserved)), key=cost)
            before, last, after = (re.escape(x) for x in (reserved[: cut - 1], reserved[cut - 1], reserved[cut:]))
            cuts.append(f"{f'(?<={before})' if before else ''}{last}(?={after})")
    return Regex("|".join(cuts)) if cuts else None


def _config(proto: Any, pieces: list[Piece], begins_with_eos: bool) -> bytes:
    names, types = [piece.text for piece in pieces], [piece.type for piece in pieces]
    trainer = proto.trainer_spec
    bos = trainer.eos_id if begins_with_eos else trainer.bos_id
    special = {
        key: names[i]
        for key, i in (("bos_token", bos), ("eos_token", trainer.eos_id))
        if 0 <= i < len(types) and types[i] == _CONTROL
    }
    unk = names[types.index(_UNKNOWN)]
    # Padding is never eos, which a collator would then hide from the loss; unk stands for nothing where bytes do.
    pad = names[trainer.pad_id] if 0 <= trainer.pad_id < len(types) else unk
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "unk_token": unk,
        "pad_token": pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a written "</s>" is ordinary characters
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return json.dumps(config, indent=2, ensure_ascii=False).encode()


def _clip(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else shown[:77] + "…"
