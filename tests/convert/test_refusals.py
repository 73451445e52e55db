"""What a conversion must not pass over: each of these once ended in a wrong model and the word "done"."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.tokenizer import train_tokenizer
from sisa_dist.config import load_config
from sisa_dist.convert.conversion import plan
from sisa_dist.convert.verify import is_rounded

LLAMA = {"mixer": "attention", "d_s": None, "qk_norm": False, "vocab_multiple": 1}


@pytest.fixture
def llama(make_checkpoint: Callable[..., Any], tmp_path: Path) -> Path:
    """A tied Llama of transformers' own making, of 300 ids."""
    made = make_checkpoint(moments=False, **LLAMA)
    assert convert_checkpoint.main([str(made.folder), str(tmp_path / "llama"), "--to", "hf"]) == 0
    return tmp_path / "llama"


def refused(said: str, capsys: pytest.CaptureFixture[str], *arguments: Any) -> None:
    capsys.readouterr()
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_head_that_is_not_the_embedding_is_not_tied(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(llama / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for head in (embedding.clone(), 2 * embedding):
        save_file({**weights, "lm_head.weight": head}, llama / "model.safetensors", metadata={"format": "pt"})
        arguments = (llama, tmp_path / "out", "--to", "native", "--upcycle", "8", "--verify", "blocks")
        if torch.equal(head, embedding):
            assert convert_checkpoint.main([str(argument) for argument in (*arguments, "--dry-run")]) == 0
        else:
            refused(
                "lm_head.weight is not model.embed_tokens.weight: set tie_word_embeddings to false", capsys, *arguments
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [280, 310])
def test_a_vocabulary_of_other_rows_is_not_padded(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.embed_tokens.weight"] = torch.randn(rows, 32)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused(
        f"vocab_size is 300 and the embedding or head has {rows} rows", capsys, llama, tmp_path / "o", "--to", "native"
    )


def test_integers_are_no_weights(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused("is int8: quantised weights are not read", capsys, llama, tmp_path / "o", "--to", "native")


def test_weights_that_are_not_finite_are_named(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    refused("logits are not finite: a weight is NaN or inf", capsys, llama, tmp_path / "o", "--to", "native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "step_00000007"]


def test_a_tokenizer_must_fit(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, junk = tmp_path / "large.model", tmp_path / "junk.model"
    train_tokenizer(["the quick brown fox jumps over the lazy dog " * 200 + "abcdefghij" * 90], large, vocab_size=310)
    junk.write_text("no tokenizer")
    out = tmp_path / "out"
    refused("its tokenizer has 310 ids, the model 300", capsys, llama, out, "--to", "native", "--tokenizer", large)
    refused("not a SentencePiece model", capsys, llama, out, "--to", "native", "--tokenizer", junk)


def test_rounding_between_formats_of_one_width_is_rounding(llama: Path, tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in load_file(llama / "model.safetensors").items()}
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    going = plan(llama, to="hf", dtype="bf16")
    assert is_rounded(going.before, going.intended)
    assert not is_rounded(going.before, plan(llama, to="native").intended)
    assert convert_checkpoint.main([str(llama), str(tmp_path / "out"), "--to", "hf", "--dtype", "bf16"]) == 0


def test_the_context_is_the_models_own(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    assert config["max_position_embeddings"] == 64  # what it was trained at
    (llama / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    for source, name, to in ((llama, "native", "native"), (tmp_path / "native", "again", "hf")):
        assert convert_checkpoint.main([str(source), str(tmp_path / name), "--to", to]) == 0
    assert load_config(tmp_path / "native" / "config.yaml").training.seq_len == 96
    assert json.loads((tmp_path / "again" / "config.json").read_text())["max_position_embeddings"] == 96


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "safetensors", "--zero-stage", "3"), "--zero-stage has no effect on --to safetensors"),
        (("--to", "native", "--shard-gb", "1"), "--shard-gb has no effect on --to native"),
        (("--to", "native", "--model-type", "llama"), "--model-type has no effect"),
        (("--to", "deepspeed", "--tp", "3", "--dry-run"), "parallel.tp 3 does not divide n_heads 4"),
    ],
)
def test_an_option_without_effect_or_future_is_refused_at_once(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    refused(said, capsys, llama, tmp_path / "out.safetensors", *arguments)


def test_a_dry_run_looks_at_the_destination(
    make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_checkpoint()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for destination, said in (
        (tmp_path / "link", "is there already"),
        (tmp_path / "no" / "out", "no such folder"),
        (made.folder / "out", "lies inside the checkpoint"),
    ):
        refused(said, capsys, made.folder, destination, "--to", "native", "--dry-run")
