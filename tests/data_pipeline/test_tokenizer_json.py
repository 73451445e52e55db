"""A tokenizer.json does what a SentencePiece model does here, and nothing that its text did not ask for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.index import Index
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer, check_text_returns, find_tokenizer, train_tokenizer
from data_pipeline.tokenizer_base import token_dtype
from data_pipeline.tokenizer_json import JsonTokenizer, byte_marks
from samples import make_text
from sisa_dist.config import RunConfig, UserError

tokenizers = pytest.importorskip("tokenizers")
NEOX = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "gptneox" / "tokenizer.json"
EOS, PAD = "<|endoftext|>", "<|padding|>"
TEXTS = [make_text(i) for i in range(60)]
HARD = [
    "",
    " ",
    "  a  ",
    "\t\t\n\n\r\n",
    "\x00\x7f",
    "😀👩‍👩‍👧‍👦 e\u0301 é",
    "</s><s><unk>",
    "\u2581 \u2581",
    "x" * 20_000,
    "1234567890.00",
]


@functools.cache
def tree_of(vocab_size: int = 400) -> str:
    """A byte-level BPE trained on the spot, as GPT-NeoX's is made but for NFC."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return str(made.to_str())


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(change): tokenizer.json with `change` made to its tree."""

    def make(change: Callable[[dict[str, Any]], object] = lambda tree: None, **beside: Any) -> Path:
        tree = json.loads(tree_of())
        change(tree)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
        for name, content in beside.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path / "tokenizer.json"

    return make


def test_the_file_says_what_it_is(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write()
    other = path.rename(tmp_path / "renamed.model")
    made = Tokenizer.load(other)
    assert isinstance(made, JsonTokenizer) and made.vocab_size == 400 and made.piece(made.eos_id) == EOS
    assert made.bos_id == -1 and made.unknown_id() == -1 and made.model == other.read_bytes()
    with pytest.raises(UserError, match=r"set model\.vocab_size to 400"):
        Tokenizer.load(other, max_vocab_size=399)
    with pytest.raises(ValueError, match="outside"):
        made.decode([400])


def test_a_folder_holds_either(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer.load(tmp_path / "empty")
    assert find_tokenizer(tmp_path) is None
    path = write()
    assert find_tokenizer(tmp_path) == path and isinstance(Tokenizer.load(tmp_path), JsonTokenizer)
    train_tokenizer(TEXTS, tmp_path / "tokenizer.model", vocab_size=320)
    assert Tokenizer.load(tmp_path).path.name == "tokenizer.model"


def test_what_it_writes_is_read_as_the_same(write: Callable[..., Path], tmp_path: Path) -> None:
    made = Tokenizer.load(write(tokenizer_config={"eos_token": {"content": PAD}, "bos_token": EOS}))
    assert (made.piece(made.eos_id), made.piece(made.bos_id)) == (PAD, EOS)
    (tmp_path / "kept").mkdir()
    for name, content in made.files.items():
        (tmp_path / "kept" / name).write_bytes(content)
    for again in (Tokenizer.load(tmp_path / "kept"), Tokenizer.of_files(made.files, tmp_path)):
        assert again is not None
        assert (again.sha256, again.eos_id, again.bos_id) == (made.sha256, made.eos_id, made.bos_id)
    assert made.sha256 != Tokenizer.load(made.path, eos=EOS).sha256  # other documents' ends, other data


def test_hard_texts_come_back_exactly(write: Callable[..., Path]) -> None:
    made = Tokenizer.load(write())
    for text in HARD + TEXTS:
        ids = made.encode(text)
        assert made.decode([made.eos_id, *ids, made.eos_id]) == text
        assert made.eos_id not in ids and all(0 <= i < made.vocab_size for i in ids)
    assert made.encode_batch(HARD + TEXTS) == [made.encode(text) for text in HARD + TEXTS]


@functools.cache
def loaded() -> JsonTokenizer:
    return JsonTokenizer(tree_of().encode(), Path("tokenizer.json"), names={})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from([EOS, PAD, "<|"]))))
def test_no_text_makes_a_special_token(parts: list[str]) -> None:
    text, made = "".join(parts), loaded()
    ids = made.encode(text)
    assert not {made.eos_id, 1} & set(ids) and made.decode(ids) == text


def test_what_is_not_the_texts_own_is_off(write: Callable[..., Path]) -> None:
    """A file may say: cut at 3 tokens, pad to 50, drop merges by chance, put an eos at the end."""
    plain = Tokenizer.load(write()).encode_batch(TEXTS[:5])

    def change(tree: dict[str, Any]) -> None:
        tree["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        tree["padding"] = {
            "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
            "pad_type_id": 0, "pad_token": PAD,
        }  # fmt: skip
        tree["model"]["dropout"] = 0.5
        end = {"SpecialToken": {"id": EOS, "type_id": 0}}
        tree["post_processor"] = {
            "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {EOS: {"id": EOS, "ids": [0], "tokens": [EOS]}},
        }  # fmt: skip
        tree["added_tokens"][0]["special"] = False

    changed = write(change)
    raw = tokenizers.Tokenizer.from_file(str(changed))
    assert raw.encode(TEXTS[0] + EOS).ids != plain[0]  # the library itself would do all that
    made = Tokenizer.load(changed)
    assert [made.encode_batch(TEXTS[:5]) for _ in range(3)] == [plain] * 3
    assert made.eos_id not in made.encode(f"a{EOS}")


END = {"id": 400, "content": "</s>", "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


@pytest.mark.parametrize(
    ("change", "beside", "what"),
    [
        (lambda tree: tree["added_tokens"].clear(), {}, r"no added token has a known name.*data\.tokenizer\.eos"),
        (lambda tree: tree["added_tokens"].append(END), {}, "it has <.*and </s>"),
        (lambda tree: None, {"tokenizer_config": {"eos_token": "<eot>"}}, "has no token '<eot>'"),
        (lambda tree: tree["model"]["vocab"].update({"zzz": 500}), {}, "ids are not 0, 1, 2.*400"),
        (lambda tree: tree.pop("model"), {}, r"not a tokenizer\.json"),
        (lambda tree: None, {"tokenizer_config": ["no", "mapping"]}, "it is no mapping"),
        (lambda tree: None, {"tokenizer_config": {"eos_token": "a"}}, "would become that token"),
    ],
)  # fmt: skip
def test_what_is_unusable_is_refused_in_a_line(
    write: Callable[..., Path], change: Callable[..., Any], beside: dict[str, Any], what: str
) -> None:
    with pytest.raises(UserError, match=what) as caught:
        Tokenizer.load(write(change, **beside))
    assert "\n" not in str(caught.value)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    for content in ('{"', "{}", '{"model": {"type": "Nonsense"}}', '{"added_tokens": 3}', '{"added_tokens": [3]}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError):
            Tokenizer.load(tmp_path, eos=EOS)


def test_text_that_does_not_come_back_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    def lower(tree: dict[str, Any]) -> None:
        tree["normalizer"] = {"type": "Lowercase"}

    check_text_returns(Tokenizer.load(write()))
    with pytest.raises(UserError, match=r"loses text: .It is 12"):
        check_text_returns(Tokenizer.load(write(lower)))
    check_text_returns(train_tokenizer(TEXTS, tmp_path / "t.model", vocab_size=320))


def test_byte_marks_are_the_librarys() -> None:
    assert set(byte_marks().values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    (word,) = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n")
    assert [byte_marks()[byte] for byte in "é \n".encode()] == list(word[0])
    made = loaded()
    assert len(made.fallback_ids()) == 128
    assert set(made.encode("\u0b95")) & made.fallback_ids() and not set(made.encode("abc")) & made.fallback_ids()


def test_prepared_with_it_and_eos_is_a_setting(
    write: Callable[..., Path], corpus_folder: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = write()
    folder = prepare(make_config(str(corpus_folder), tokenizer={"path": str(path)}), quiet=True)
    made, index = Tokenizer.load(folder), Index.load(folder / "train")
    assert made.model == path.read_bytes() and index.tokenizer_sha256 == made.sha256 and index.eos_id == made.eos_id
    text = made.decode(i for m in range(len(index.members)) for i in index.read_member(m).tolist())
    assert all(p.read_text() in text for p in sorted(corpus_folder.iterdir())[:5]) or len(text) > 10_000
    other = make_config(str(corpus_folder), tokenizer={"path": str(path), "eos": PAD})
    with pytest.raises(UserError, match=r"data\.tokenizer\.eos was None and is now '<\|padding\|>'"):
        prepare(other, quiet=True)
    with pytest.raises(UserError, match="eos is for a tokenizer that exists"):
        make_config(str(corpus_folder), tokenizer={"eos": PAD})
    train_tokenizer(TEXTS, tmp_path / "t.model", vocab_size=320)
    with pytest.raises(UserError, match="says itself what its eos is"):
        Tokenizer.load(tmp_path / "t.model", eos="</s>")


@pytest.mark.skipif(not NEOX.is_file(), reason="GPT-NeoX's tokenizer.json is not at hand")
def test_gpt_neox() -> None:
    made = Tokenizer.load(NEOX)
    assert made.vocab_size == 50_277 and made.eos_id == 0 and token_dtype(made.vocab_size).str == "<u2"
    assert made.encode("Hello world") == [12092, 1533]
    check_text_returns(made)
    for text in [*HARD, *TEXTS]:
        ids = made.encode(text)
        assert 0 not in ids and 1 not in ids
        if "e\u0301" not in text:  # its file composes accents
            assert made.decode(ids) == text
    assert made.decode(made.encode(f"a{EOS}b")) == f"a{EOS}b"
