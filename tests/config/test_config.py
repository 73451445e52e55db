"""Every mistake in a config is one line that names the key and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from sisa_dist.config import UserError, dump_config, files, load_config, load_run, parse_config, replace_file

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainng.steps=2", "trainng: unknown key; did you mean training?"),
        ("training.step=3", "training.step: unknown key; did you mean steps?"),
        ("training.steps=abc", "training.steps: "),
        ("training.steps=1.5", "training.steps: "),
        ("training.steps=-1", "training.steps: "),
        ("engine.activation_checkpointing=1", "engine.activation_checkpointing: "),
        ("model.mixer=rwkv", "model.mixer: "),
        ("model=3", "model: "),
        ("model.n_heads=3", "set d_model to 255 or 258"),
        ("model.n_heads=512", "set d_model to 512, or set head_dim"),
        ("model.n_kv_heads=3", "set one of [1, 2, 4]"),
        ("model.head_dim=63", "even head_dim"),
        ("model.rotary_fraction=0.01", "is 0 channels and RoPE turns pairs: set it for example to 0.03125 or 1.0"),
        ("model.rotary_fraction=1.5", "model.rotary_fraction: "),
        ("model.norm=batchnorm", "model.norm: "),
        ("model.attention_bias=true", "model.attention_bias: "),
        ("model.d_s=31", "even number"),
        ("model.d_s=null", "set d_s"),
        ("model.d_s=[32, 32]", "d_s lists 2 layers, n_layers is 4"),
        ("model.mixer=attention", "remove d_s"),
        ("model.log_alpha_min=1.0", "not negative"),
        ("training.global_batch_tokens=5000", "set 4096 or 8192"),
        ("schedule.decay_steps=2", "no effect with schedule.kind cosine"),
        ("schedule.kind=wsd", "needs decay_steps"),
        ("schedule.warmup_steps=251", "exceed training.steps 250"),
        ("data.validation_fraction=1.0", "data.validation_fraction: "),
        ("data.validation_fraction=0.0", "training.eval_every needs held-out text"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: Input should be less than 1"),
        ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas.0: "),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay: "),
        (f"seed={2**64}", "seed: Input should be less than"),
        ("model={[a]: 1}", "--set model={[a]: 1}: line 1: a key is a word"),
        ("nonsense", "write KEY=VALUE"),
        ("name=[1", "is not YAML"),
        ("seed.x=1", "seed"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_decay_bound_without_a_sisa_layer_is_refused() -> None:
    with pytest.raises(UserError, match="remove log_alpha_min"):
        load_config(QUICKSTART, ["model.mixer=attention", "model.d_s=null", "model.log_alpha_min=-1.0"])


def test_copies_of_shards_under_deepspeed_are_refused() -> None:
    copies = ["parallel.dp=4", "parallel.dp_replicate=2"]
    assert load_config(QUICKSTART, copies).parallel.dp_replicate == 2
    with pytest.raises(UserError, match="dp_replicate needs engine"):
        load_config(QUICKSTART, [*copies, "engine.kind=deepspeed"])


def test_how_to_train_a_tokenizer_is_refused_beside_one_that_exists(tmp_path: Path) -> None:
    for setting in ("model_type=unigram", "sample_bytes=100"):
        with pytest.raises(UserError, match=f"data.tokenizer: {setting.split('=')[0]} has no effect"):
            load_config(QUICKSTART, ["data.tokenizer.path=x.model", f"data.tokenizer.{setting}"])
    config = load_config(QUICKSTART, ["data.tokenizer.path=x.model"])
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_overrides_and_numbers_as_people_write_them() -> None:
    config = load_config(QUICKSTART, ["optimizer.lr=3e-4", "data.input=[a.txt, b.txt]", "training.eval_every=null"])
    assert config.optimizer.lr == 3e-4
    assert config.data.input == ["a.txt", "b.txt"]
    assert config.training.eval_every is None


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["model.d_s=[16, 32, 64, 8]"])
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_extends_lays_one_file_over_another_and_only_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(QUICKSTART.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nname: b\ntraining: {steps: 400}\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text("extends: b.yaml\n", encoding="utf-8")
    config = load_config(tmp_path / "b.yaml")
    assert (config.name, config.training.steps, config.training.seq_len) == ("b", 400, 512)
    with pytest.raises(UserError, match="only one level"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["moe.experts=4", "moe.topk=2"], "model.moe.topk: unknown key; did you mean top_k?"),
        (["mixer=mamba", "ssm.expand=0.001"], "ssm.expand 0.001 of d_model 256 gives no channel"),
        (["mixer=mamba2", "qk_norm=true"], "qk_norm is of attention, and no layer has any"),
        (["mixer=hymba", "attention_bias=all"], "set it to qkv or none"),
        (["mixer=hymba", "mlp=moe", "moe.experts=4"], "set hymba.meta_tokens to 0, or mlp to"),
    ],
)
def test_a_mistake_in_a_mixers_section_is_one_too(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, ["model.d_s=null", *(f"model.{override}" for override in overrides)])
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "line 2: a is given twice"),
        ("a: 1\n? [b, c]\n: 2\n", "line 2: a key is a word, not a list"),
        ("1: 2\n", "a key is a word, not a int"),
        ("- 1\n", "mapping"),
        ("a: [\n", "not valid YAML"),
        ("", "mapping"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        load_config(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="no such config"):
        load_config(tmp_path / "absent.yaml")


def test_every_shipped_config_is_valid() -> None:
    # Those of a sweep are grids: tests/tools/test_sweep_rules.py
    paths = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "scaling")
    assert len(paths) >= 16
    for path in paths:
        for stage in load_run(path).stages:
            assert parse_config(yaml.safe_load(dump_config(stage.config)), source=str(path)) == stage.config


def test_a_file_that_two_replace_at_once_is_one_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "table", os.replace

    def another_comes_first(beside: Path, target: Path) -> None:
        monkeypatch.setattr(files.os, "replace", rename)
        replace_file(path, b"theirs")
        rename(beside, target)

    monkeypatch.setattr(files.os, "replace", another_comes_first)
    replace_file(path, "ours")
    assert path.read_text(encoding="utf-8") == "ours" and list(tmp_path.iterdir()) == [path]
