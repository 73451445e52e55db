"""The exported tokenizer gives the ids that training saw, or is not exported."""

from __future__ import annotations

import io
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from samples import make_text
from sisa_dist.config import ModelConfig
from sisa_dist.convert import hf_sisa
from sisa_dist.convert import hf_tokenizer as conversion
from sisa_dist.convert.hf_folder import tokenizer_files
from sisa_dist.convert.hf_tokenizer import NoEqualTokenizer, hf_tokenizer

TEXTS = [make_text(i) for i in range(60)]
STDLIB = Path(sysconfig.get_paths()["stdlib"])
SOURCES = [p.read_text(encoding="utf-8")[:20_000] for p in sorted(STDLIB.glob("[a-l]*.py"))]
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
HARD = [
    "",
    " ",
    "\t",
    "\n",
    "  a  ",
    "def f(x):\n\tif x:\n\t\treturn  1\n\n\n\n\n        # é\n",
    "a\r\nb\rc\u2028d\x0b\x0c",
    "\x00a\x00\x01\x7f",
    "😀👩‍👩‍👧‍👦🇩🇪 e\u0301 é \u200b\ufeff",
    "</s><s><unk><0x41> </s>",
    "\u2581",
    "a\u2581b c\u2581\u2581 \u2581",
    "\u2585 \u3000\u00a0x",
    "1234567890.00",
    "x" * 20_000,
    *TEXTS,
    *SOURCES[:20],
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(SOURCES[20:60], path, vocab_size=1500, model_type=request.param)


def foreign(texts: Iterable[str] = SOURCES[20:50], **options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
        model_writer=model,
        vocab_size=700,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def agree(found: list[int], ids: list[int], processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Equal; or, of a unigram model, two cuts of one score (hf_tokenizer.py). BPE's scores are ranks, whole numbers."""
    scores = [processor.get_score(i) for i in range(processor.get_piece_size())]
    unigram = any(score != int(score) for score in scores)
    return found == ids or (unigram and conversion._tied(ids, found, scores))


def converted(model: bytes) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(hf_tokenizer(model)["tokenizer.json"].decode())
    made.encode_special_tokens = True
    return made


def test_auto_tokenizer_gives_our_ids_and_texts(ours: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in tokenizer_files(ours.path.read_bytes(), begins_with_eos=False).items():
        (tmp_path / name).write_bytes(content)
    theirs, processor = (
        AutoTokenizer.from_pretrained(tmp_path),
        sentencepiece.SentencePieceProcessor(model_proto=ours.model),
    )
    assert len(theirs) == ours.vocab_size
    for text in HARD:
        ids = ours.encode(text)
        assert agree(theirs(text)["input_ids"], ids, processor), text
        assert theirs.decode(ids) == text
    batch = theirs(["a b", "a"], padding=True)
    assert batch["attention_mask"][1][0] == 0 and theirs.pad_token_id != theirs.eos_token_id
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id, ours.bos_id)
    assert theirs.decode([*ours.encode("a"), ours.eos_id], skip_special_tokens=True) == "a"
    theirs.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert [again(text)["input_ids"] for text in HARD] == [theirs(text)["input_ids"] for text in HARD]


def test_any_text_has_our_ids(ours: Tokenizer) -> None:
    theirs = converted(ours.path.read_bytes())
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(ours.path.read_bytes())
    scores = [score for _, score in conversion._scores(conversion.pieces_of(proto))]
    unigram = proto.trainer_spec.model_type == 1

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab =<>/s0x41\u2581\n\t"))
    def same(text: str) -> None:
        found, ids = theirs.encode(text).ids, ours.encode(text)
        assert found == ids or (unigram and conversion._tied(ids, found, scores))
        assert theirs.decode(ours.encode(text)) == text

    same()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity"},
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "unigram", "user_defined_symbols": ["<sep>"]},
        {"model_type": "bpe"},
    ],
    ids=["llama", "unigram bytes", "unigram", "bpe"],
)
def test_usual_models_with_a_dummy_prefix_have_their_ids(options: dict) -> None:
    model = foreign(**options)
    processor, theirs = sentencepiece.SentencePieceProcessor(model_proto=model), converted(model)
    for text in [*HARD[:-20], *SOURCES[:8]]:
        ids = processor.encode(text)
        found = theirs.encode(text).ids
        assert agree(found, ids, processor), text
        if processor.unk_id() not in ids:
            assert theirs.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("name", ["t5/t5_tokenizer_base.model", "sentencepiece/test_model.model"])
def test_published_models_have_their_ids(name: str) -> None:
    if not (REAL / name).is_file():
        pytest.skip(f"{REAL / name} is not here")
    model = (REAL / name).read_bytes()
    processor, theirs = sentencepiece.SentencePieceProcessor(model_proto=model), converted(model)
    for text in [*HARD[:-20], *SOURCES[:8]]:
        assert theirs.encode(text).ids == processor.encode(text), text


def test_what_cannot_be_equal_is_refused_and_only_the_model_is_kept() -> None:
    odd = foreign(model_type="bpe", byte_fallback=True, user_defined_symbols=["\n"])  # spaces at lines' ends are lost
    with pytest.raises(NoEqualTokenizer, match="no equal tokenizer"):
        hf_tokenizer(odd)
    with pytest.warns(UserWarning, match="no equal tokenizer"):
        files = tokenizer_files(odd, begins_with_eos=False)
    assert files.keys() == {"tokenizer.model", "generation_config.json"} and files["tokenizer.model"] == odd
    with pytest.raises(NoEqualTokenizer, match="words or characters"):
        hf_tokenizer(foreign(model_type="char"))


@pytest.mark.parametrize("mutation", ["merges", "bytes", "user defined"])
def test_the_check_sees_a_wrong_conversion(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = train_tokenizer(SOURCES[20:60], tmp_path / "t.model", vocab_size=1500)
    build = conversion._build

    def wrong(proto: object, pieces: list) -> tokenizers.Tokenizer:
        made = json.loads(build(proto, pieces).to_str())
        if mutation == "merges":
            merges = made["model"]["merges"]
            merges[20], merges[900] = merges[900], merges[20]
        elif mutation == "bytes":
            made["model"]["byte_fallback"] = False
        else:
            made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] != "\n\n"]
        return tokenizers.Tokenizer.from_str(json.dumps(made))

    monkeypatch.setattr(conversion, "_build", wrong)
    with pytest.raises(NoEqualTokenizer, match="no equal tokenizer"):
        hf_tokenizer(ours.path.read_bytes())


def test_only_ties_of_score_are_let_pass() -> None:
    scores = [-1.0, -2.0, -3.0, -3.0001]
    assert conversion._tied([0, 2], [1, 1], scores)
    assert not conversion._tied([0, 2], [0, 3], scores)


def test_auto_tokenizer_of_a_folder_with_code_asks_and_runs_nothing_where_told_so(
    ours: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads config.json first, and the auto_map that the model needs there makes it ask: no key prevents that."""
    config = hf_sisa.write_config(ModelConfig(vocab_size=512, d_model=32, n_layers=2, n_heads=4, d_ff=48, d_s=8))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_sisa.py").write_text("raise SystemExit('it was run')")
    for name, content in hf_tokenizer(ours.model).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert theirs("def f(x):")["input_ids"] == ours.encode("def f(x):")
