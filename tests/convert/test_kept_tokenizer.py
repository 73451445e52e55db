"""A model that came with tokenizer.json keeps it: imported, kept, evaluated and generated with, exported again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_json import JsonTokenizer
from samples import make_text
from sisa_dist.checkpoint import load_model
from sisa_dist.config import UserError
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.convert.formats import open_checkpoint
from sisa_dist.convert.hf_folder import json_tokenizer_files
from sisa_dist.training.generate import stream_text

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
EOS, BOS = "<|endoftext|>", "<|begin|>"
TEXTS = [make_text(i) for i in range(40)] + [f"a {EOS} b {BOS}", "  two\t\n\n lines ", "naïve 東京"]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A GPT-NeoX folder with weights at random and a byte-level tokenizer.json."""
    torch.manual_seed(0)
    folder = tmp_path / "theirs"
    config = transformers.GPTNeoXConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        rotary_pct=0.5,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=390, special_tokens=[EOS, BOS], initial_alphabet=alphabet, show_progress=False
    )
    whole.train_from_iterator(TEXTS, trainer)
    whole.save(str(folder / "tokenizer.json"))
    beside = {"eos_token": EOS, "bos_token": BOS, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    return folder


def made(source: Path, destination: Path, to: str, **options: Any) -> Path:
    assert list(convert(plan(source, to=to, **options), destination, how="blocks"))
    return destination


def test_it_comes_in_is_kept_and_goes_out(theirs: Path, tmp_path: Path) -> None:
    content = (theirs / "tokenizer.json").read_bytes()
    native = made(theirs, tmp_path / "step_00000000", "native")
    one_file = made(native, tmp_path / "a.safetensors", "safetensors")
    back = made(one_file, tmp_path / "back", "native")
    out = made(back, tmp_path / "out", "hf")
    for folder in (native, back, out):
        assert (folder / "tokenizer.json").read_bytes() == content
        found = Tokenizer.load(folder)
        assert (found.piece(found.eos_id), found.piece(found.bos_id)) == (EOS, BOS)
    _, ours = load_model(back)
    exported = transformers.AutoTokenizer.from_pretrained(out)
    assert (exported.eos_token, exported.bos_token) == (EOS, BOS)
    for text in TEXTS:
        ids = ours.encode(text)
        assert exported.encode(text, add_special_tokens=False) == ids and exported.decode(ids) == text
        assert ours.eos_id not in ids
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 0}
    text = "".join(stream_text(back, prompt="def ", max_tokens=8, temperature=0.0, top_p=1.0, seed=0))
    assert isinstance(text, str)


def test_deepspeed_keeps_it(theirs: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    between = made(theirs, tmp_path / "ds", "deepspeed")
    back = made(between, tmp_path / "back", "native")
    assert Tokenizer.load(back).sha256 == Tokenizer.load(theirs).sha256


def test_trained_here_a_document_begins_after_eos(theirs: Path) -> None:
    tokenizer = Tokenizer.load(theirs)
    assert isinstance(tokenizer, JsonTokenizer)
    files = json_tokenizer_files(tokenizer, begins_with_eos=True)
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == EOS
    assert json.loads(files["generation_config.json"])["bos_token_id"] == tokenizer.eos_id


def test_one_that_cannot_be_used_is_left_behind_and_said(theirs: Path, tmp_path: Path) -> None:
    path = theirs / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.warns(UserWarning, match="has no token '<none>'.*taken without it"):
        assert open_checkpoint(theirs).tokenizer is None
    path.write_text(json.dumps({"eos_token": EOS}))
    config = json.loads((theirs / "config.json").read_text())
    assert open_checkpoint(theirs).tokenizer is not None and config["vocab_size"] == 400
    with pytest.raises(UserError, match="came without a tokenizer"):
        bare = tmp_path / "bare"
        (theirs / "tokenizer.json").unlink()
        load_model(made(theirs, bare, "native"))
