"""A model of transformers goes on to longer contexts: imported, trained in stages of several layouts, exported.

RoPE is stretched by YaRN from stage to stage, which the folder that comes out says to transformers.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import torch
import yaml

from data_pipeline.prepare import prepare
from distributed.launched import exit_codes, said, start_ranks
from multihost.clone import make_environment
from runs import Stages, losses, tensors
from samples import make_text
from sisa_dist.checkpoint import list_checkpoints, load_model
from sisa_dist.config import load_run
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.signals import NextStage
from sisa_dist.training.trainer import train

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
TRAINED, VOCAB, EOS = 32, 320, "<|endoftext|>"  # tokens of the sequences it was trained on, as its folder says
MODELS: dict[str, dict[str, Any]] = {"llama": {"mixer": "attention"}, "sisa": {"mixer": "sisa", "d_s": 8}}
UPCYCLE = {"llama": [], "sisa": ["--upcycle", "8"]}


def yarn(factor: float) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": TRAINED}}


# As configs/long_context has them: a stage as long as before, and two of longer sequences in layouts of their own. The
# first takes another base than the folder's, which the run has a right to.
LENGTHS: Stages = [
    {"name": "as_trained", "steps": 2, "model": {"rope_theta": 2e4}, "training": {"seq_len": TRAINED}},
    {"name": "longer", "steps": 2, "model": yarn(2.0), "training": {"seq_len": 2 * TRAINED}},
    {"name": "longest", "steps": 2, "model": yarn(4.0), "training": {"seq_len": 4 * TRAINED}},
]
LAYOUTS: Stages = [
    {"parallel": {"dp": 1}},
    {
        "parallel": {"tp": 2, "sequence_parallel": True, "dp": 1},
        "engine": {"activation_checkpointing": True, "mlp_chunk": 24},
    },
    {"parallel": {"cp": 2, "dp": 1}, "engine": {"activation_checkpointing": True, "activation_offload": True}},
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of transformers with weights at random, and a tokenizer.json."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED},
            **{"initializer_range": 0.2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        )
    ).save_pretrained(folder)
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    whole.train_from_iterator([make_text(number) for number in range(40)], trainer)
    whole.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return folder


def convert(*arguments: object) -> None:
    assert convert_checkpoint.main([str(argument) for argument in arguments]) == 0


def write_run(folder: Path, name: str, stages: Stages, *, model: str, theirs: Path) -> Path:
    """FOLDER/NAME.yaml, whose data are prepared and which begins with FOLDER/imported."""
    if not (folder / "texts").exists():
        (folder / "texts").mkdir()
        for number in range(60):
            (folder / "texts" / f"{number}.txt").write_text(make_text(number) * 3, encoding="utf-8")
    tree: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / name),
        "device": "cpu",
        "start": {"weights": str(folder / "imported")},
        "model": {
            **{"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48},
            **{"norm_eps": 1e-5, "tie_embeddings": False},
            **MODELS[model],
        },
        "data": {
            **{"input": f"{folder}/texts/*.txt", "folder": str(folder / "data"), "document_mask": True},
            **{"tokenizer": {"path": str(theirs / "tokenizer.json")}, "validation_fraction": 0.0},
        },
        "optimizer": {"lr": 1e-3, "eps": 1e-5},  # of a vanishing gradient's rounding Adam makes no step
        "schedule": {"warmup_steps": 1},
        "training": {"global_batch_tokens": 256},
        "stages": stages,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    prepare(load_run(path).stages[0].config, quiet=True)
    return path


def in_layouts() -> Stages:
    return [length | layout for length, layout in zip(LENGTHS, LAYOUTS, strict=True)]


def check_exported(run: Path, destination: Path, *, rope: dict[str, Any]) -> None:
    """transformers computes what we compute, as far as the last stage went."""
    convert(run, destination, "--to", "hf")
    said = json.loads((destination / "config.json").read_text())
    assert said["rope_scaling"].items() >= rope.items()
    model, _ = load_model(run)
    twin = transformers.AutoModelForCausalLM.from_pretrained(destination, trust_remote_code=True).eval()
    tokens = torch.randint(0, VOCAB, (2, 4 * TRAINED), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, found = model(tokens), twin(tokens).logits
    assert ours.std() > 0.3 and (found - ours).abs().max() < 1e-4 * ours.abs().max()


def check_like_one_process(run: Path, plain: Path) -> None:
    assert [record["stage"] for record in read_metrics(run)["train"]] == [1, 1, 2, 2, 3, 3]
    for ours, theirs in zip(losses(run), losses(plain), strict=True):
        assert (ours[0], ours[3]) == (theirs[0], theirs[3])
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=2e-5)
    one, many = (tensors(list_checkpoints(folder)[-1]) for folder in (plain, run))
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: name + text)


def _train(path: Path) -> None:
    train(load_run(path), quiet=True)


def test_a_llama_goes_on_through_lengths_and_layouts(
    theirs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(theirs, tmp_path / "imported", "--to", "native")
    _train(write_run(tmp_path, "plain", LENGTHS, model="llama", theirs=theirs))
    assert "imported: model.rope_theta is 10000.0 there and 20000.0 here" in caplog.text
    path = write_run(tmp_path, "run", in_layouts(), model="llama", theirs=theirs)
    with pytest.raises(NextStage) as ended:
        _train(path)
    assert ended.value.code == 76 and len(losses(tmp_path / "run")) == 2
    for number, code in ((2, 76), (3, 0)):
        ranks = tmp_path / f"ranks{number}"
        assert exit_codes(start_ranks(_train, 2, ranks, path)) == [code] * 2, said(ranks, 0)
    check_like_one_process(tmp_path / "run", tmp_path / "plain")
    check_exported(tmp_path / "run", tmp_path / "out", rope=yarn(4.0)["rope_scaling"])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_launch_sh_takes_an_import_and_an_upcycling_through_them(theirs: Path, tmp_path: Path, model: str) -> None:
    make_environment(tmp_path)
    convert(theirs, tmp_path / "imported", "--to", "native", *UPCYCLE[model])
    _train(write_run(tmp_path, "plain", LENGTHS, model=model, theirs=theirs))
    write_run(tmp_path, "run", in_layouts(), model=model, theirs=theirs)
    ended = subprocess.run(
        ["./launch.sh", "train", "run.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (ended.stdout + ended.stderr).count("--standalone --nproc-per-node 2") == 2
    assert "* model.rope_scaling.factor: 4.0" in ended.stdout
    check_like_one_process(tmp_path / "run", tmp_path / "plain")
    check_exported(tmp_path / "run", tmp_path / "out", rope=yarn(4.0)["rope_scaling"])
