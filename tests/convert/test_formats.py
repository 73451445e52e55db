"""Every format to every other by the tool itself, and what transformers writes, run by transformers and by us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_checkpoints
import convert_checkpoint
import pytest
import torch

from sisa_dist.config import UserError
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.convert.formats import ARCHITECTURES, FORMATS, architecture, detect, open_checkpoint


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def tool(*arguments: Any) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def same(a: Path, b: Path) -> int:
    return compare_checkpoints.main([str(a), str(b)])


# vocab_multiple 1: no padding rows, which Hugging Face folders do not hold.
SETTINGS = {
    "sisa": {"vocab_multiple": 1},
    "transformer": {"vocab_multiple": 1, "mixer": "attention", "d_s": None},
    "neox": {
        "vocab_multiple": 1,
        "mixer": "attention",
        "d_s": None,
        "qk_norm": False,
        "n_kv_heads": None,
        "norm": "layernorm",
        "mlp": "gelu",
        "mlp_bias": True,
        "attention_bias": "all",
        "parallel_residual": True,
        "rotary_fraction": 0.25,
        "tie_embeddings": False,
    },
}


@pytest.mark.parametrize(("kind", "model_type"), [("sisa", "sisa"), ("transformer", "qwen3"), ("neox", "gpt_neox")])
def test_round_every_format_and_back(
    make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, model_type: str
) -> None:
    made = make_checkpoint(moments=False, **SETTINGS[kind])
    path = made.folder
    for number, to in enumerate(("hf", "safetensors", "hf", "native")):
        before, path = path, tmp_path / f"{number}.safetensors"
        assert tool(before, path, "--to", to, "--tokenizer", _tokenizer(tmp_path)) == 0, capsys.readouterr().err
        assert detect(path) == to and same(made.folder, path) == 0
        if to == "hf":
            out = capsys.readouterr().out
            assert "the whole model in transformers" in out
            assert json.loads((path / "config.json").read_text())["model_type"] == model_type
    assert open_checkpoint(path).source.specs.keys() == made.tensors.keys()


def _tokenizer(folder: Path) -> Path:
    import sentencepiece

    text, path = folder / "text", folder / "tokenizer.model"
    if not path.exists():
        text.write_text("\n".join(f"some {chr(97 + n % 26)}{n} text to cut" for n in range(300)))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    return path


@pytest.mark.parametrize(
    "topology", [*(pytest.param(t, marks=pytest.mark.slow) for t in [(0, 1, 1), (2, 2, 1)]), (3, 2, 2)]
)
def test_deepspeed_and_back_to_the_bit(
    make_checkpoint: Callable[..., Any], tmp_path: Path, topology: tuple[int, int, int]
) -> None:
    pytest.importorskip("deepspeed")
    made = make_checkpoint()
    options = [f"--{name}={value}" for name, value in zip(("zero-stage", "dp", "tp"), topology, strict=True)]
    assert tool(made.folder, tmp_path / "ds", "--to", "deepspeed", *options) == 0
    assert detect(tmp_path / "ds") == detect(tmp_path / "ds/global_step7") == "deepspeed"
    assert same(made.folder, tmp_path / "ds") == 0
    assert tool(tmp_path / "ds/global_step7", tmp_path / "back", "--to", "native") == 0
    assert same(made.folder, tmp_path / "back") == 0 and open_checkpoint(tmp_path / "back").has_moments
    for name in ("state.json", "data.json", "tokenizer.model"):
        read = json.loads if name.endswith("json") else bytes
        assert read((tmp_path / "back" / name).read_bytes()) == read((made.folder / name).read_bytes())


def test_deepspeed_without_moments_stays_without(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    made = make_checkpoint(moments=False)
    assert tool(made.folder, tmp_path / "ds", "--to", "deepspeed") == 0
    assert not open_checkpoint(tmp_path / "ds").has_moments
    assert tool(tmp_path / "ds", tmp_path / "back", "--to", "native") == 0
    assert json.loads((tmp_path / "back/state.json").read_text())["weights_only"] is True


def _foreign(kind: str, folder: Path, **changes: Any) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "initializer_range": 0.2}  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**common, num_key_value_heads=2, **changes)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPTNeoXConfig(**common, rotary_pct=0.5, **changes)
        model = transformers.GPTNeoXForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="20KB")


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_a_transformer_of_transformers_comes_in_and_goes_out(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _foreign(kind, tmp_path / "theirs")
    assert tool(tmp_path / "theirs", tmp_path / "ours", "--to", "native", "--verify", "full") == 0
    out = capsys.readouterr().out
    assert "come back as they were" in out and "the whole model in transformers" in out and "--tokenizer" in out
    assert tool(tmp_path / "ours", tmp_path / "again", "--to", "hf", "--verify", "full") == 0
    assert same(tmp_path / "theirs", tmp_path / "again") == 0


def test_upcycled_it_computes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _foreign("llama", tmp_path / "theirs")
    arguments = (tmp_path / "theirs", tmp_path / "ours", "--to", "native", "--upcycle", "8,0")
    assert tool(*arguments, "--verify", "full") == 0
    out = capsys.readouterr().out
    assert "logits of the old and the new architecture" in out and "the whole model in transformers" in out
    opened = open_checkpoint(tmp_path / "ours")
    assert opened.model.layer_mixers == ["sisa", "attention"] and opened.state()["step"] == 0
    assert not opened.source.read("model.blocks.0.mixer.wb.weight").any()
    assert opened.source.read("model.blocks.0.mixer.wc.weight").any()


def test_an_upcycling_that_changes_the_function_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sisa_dist.convert import conversion
    from sisa_dist.convert.recipe import Recipe

    _foreign("llama", tmp_path / "theirs")
    right = conversion.recipes

    def wrong(*arguments: Any, **named: Any) -> dict[str, Recipe]:
        made = dict(right(*arguments, **named))
        shape = made["blocks.0.mixer.wb.weight"].make().shape
        made["blocks.0.mixer.wb.weight"] = Recipe((), lambda: torch.full(shape, 0.5))
        return made

    monkeypatch.setattr(conversion, "recipes", wrong)
    with pytest.raises(UserError, match="is not the model"):
        list(convert(plan(tmp_path / "theirs", to="native", d_s=8), tmp_path / "ours", how="blocks"))
    assert not (tmp_path / "ours").exists()


def test_an_architecture_that_cannot_hold_the_model_says_why(make_checkpoint: Callable[..., Any]) -> None:
    from sisa_dist.convert.opened import Target

    made = make_checkpoint(moments=False)
    with pytest.raises(UserError, match="has sisa layers"):
        plan(made.folder, to="hf", target=Target(model_type="llama"))
    transformer = make_checkpoint("b", moments=False, mixer="attention", d_s=None)
    with pytest.raises(UserError, match="this model is one of type qwen3: give that"):
        plan(transformer.folder, to="hf", target=Target(model_type="mistral"))


@pytest.mark.parametrize(("option", "why"), [("--upcycle=a", "give d_s as a number"), ("--config=x.yaml", "x.yaml")])
def test_options_that_make_no_sense(
    make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, why: str
) -> None:
    assert tool(make_checkpoint().folder, tmp_path / "out", "--to", "native", option) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


def test_the_tables_name_modules_that_keep_their_contract() -> None:
    for model_type in ARCHITECTURES:
        module = architecture(model_type)
        assert model_type in module.MODEL_TYPES and callable(module.imports) and callable(module.exports)
    assert list(FORMATS) == ["native", "safetensors", "hf", "deepspeed"]
