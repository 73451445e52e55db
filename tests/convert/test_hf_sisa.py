"""The folder of an exported SISA model stands on its own, and its config and tensors come back as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import CASES, Held, exported, random_model, tiny, tokens_of, write_weights
from pydantic import Field
from safetensors.torch import load_file, save_file

from data_pipeline.tokenizer import train_tokenizer
from samples import make_text
from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert import hf_folder, hf_sisa
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.convert.formats import open_checkpoint
from sisa_dist.convert.recipe import Converted
from sisa_dist.model import generate


@pytest.mark.parametrize("case", CASES)
def test_configs_and_tensors_come_back(case: str) -> None:
    config = tiny(**CASES[case])
    written = json.loads(json.dumps(hf_sisa.write_config(config)))
    assert hf_sisa.read_config(written) == config
    model = random_model(config)
    back = Converted(Held(exported(model)), hf_sisa.imports(config))
    assert back.specs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        wanted = parameter.detach().clone()
        if name in ("embed.weight", "head.weight"):
            wanted[config.vocab_size :] = 0  # ours were not: padding is cut and comes back empty
        assert torch.equal(back.read(name), wanted), name


def test_long_forms_come_back_short() -> None:
    long = tiny(mixer=["sisa", "sisa"], d_s=[8, 8], n_kv_heads=4, head_dim=8)
    assert hf_sisa.read_config(hf_sisa.write_config(long)) == tiny()
    uneven = tiny(mixer=["attention", "sisa"], d_s=[0, 6])
    assert hf_sisa.read_config(hf_sisa.write_config(uneven)) == tiny(mixer=["attention", "sisa"], d_s=6)


def test_configs_that_are_none_are_refused() -> None:
    written = hf_sisa.write_config(tiny())
    with pytest.raises(UserError, match="layer_d_s"):
        hf_sisa.read_config({k: v for k, v in written.items() if k != "layer_d_s"})
    for missing in ("log_alpha_min", "hidden_size"):
        with pytest.raises(UserError, match=f"{missing} is missing"):
            hf_sisa.read_config({k: v for k, v in written.items() if k != missing})
    for wrong in ([8], [8, "8"], [[8], [8]]):
        with pytest.raises(UserError, match="must be 2 whole numbers, one for each of num_hidden_layers"):
            hf_sisa.read_config(written | {"layer_d_s": wrong})
    with pytest.raises(UserError, match="num_hidden_layers is '2' and must be a whole number: mend it"):
        hf_sisa.read_config(written | {"num_hidden_layers": "2"})
    with pytest.raises(UserError, match="d_model: Input should be greater than 0, not 0: mend it"):
        hf_sisa.read_config(written | {"hidden_size": 0, "head_dim": 8})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("norm", "layernorm"),
        ("mlp", "gelu"),
        ("parallel_residual", True),
        ("ffn", "ssm_gated"),
        ("attention_bias", "qkv"),
        ("rotary_fraction", 0.5),
    ],
)
def test_what_the_exported_code_cannot_compute_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(UserError, match=f"model.{setting} is {value!r}"):
        hf_sisa.write_config(tiny(**{setting: value}))


def test_settings_of_tomorrow_are_refused_unless_they_say_nothing_new() -> None:
    class Tomorrow(ModelConfig):
        gate: bool = False
        sinks: list[int] = Field(default_factory=list)

    fields = tiny().model_dump()
    assert hf_sisa.write_config(Tomorrow(**fields)) == hf_sisa.write_config(tiny())
    for new in ({"gate": True}, {"sinks": [1]}):
        with pytest.raises(UserError, match=f"model.{next(iter(new))}"):
            hf_sisa.write_config(Tomorrow(**fields, **new))
    unknown = tiny().model_copy(update={"mixer": "fox"})
    with pytest.raises(UserError, match="fox"):
        hf_sisa.write_config(unknown)


# Runs where neither of our packages can be imported: what it does, any user of transformers can.
ALONE = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.modules["sisa_dist"] = sys.modules["data_pipeline"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, again, inputs, outputs = sys.argv[1:]
tokens = load_file(inputs)["tokens"]
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
made, settings = {}, {"max_new_tokens": 20, "do_sample": False}
made["cached"] = model.generate(tokens, **settings)
made["uncached"] = model.generate(tokens, use_cache=False, **settings)
with torch.no_grad():
    made["logits"] = model(tokens).logits
    made["hidden"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(tokens).last_hidden_state
    model.save_pretrained(again)
    made["again"] = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(tokens).logits
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    made["half"] = half(tokens).logits.float()
text = AutoTokenizer.from_pretrained(folder)
save_file({name: x.contiguous() for name, x in made.items()}, outputs)
found = {
    "dtypes": {name: str(p.dtype) for name, p in half.named_parameters()},
    "ids": text("def f(x):\\n\\treturn  x\\n")["input_ids"],
    "pad": model.generation_config.pad_token_id,
}
open(outputs + ".json", "w").write(json.dumps(found))
"""


def run_alone(tmp_path: Path, *arguments: Path) -> Any:
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(f"{arguments[-1]}.json").read_text())


def test_a_fresh_process_without_our_packages(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([make_text(i) for i in range(60)], tmp_path / "t.model", vocab_size=320)
    model = random_model(tiny(**CASES["mixed"], qk_norm=True, vocab_size=320), decay=0.3)
    folder, tokens = write_weights(tmp_path / "exported", model), tokens_of(2, 13)
    for name, content in (hf_sisa.files() | hf_folder.tokenizer_files(tokenizer.model, begins_with_eos=True)).items():
        (folder / name).write_bytes(content)
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_sisa.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    save_file({"tokens": tokens}, tmp_path / "in.safetensors")
    found = run_alone(tmp_path, folder, tmp_path / "again", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        wanted = model(tokens)
    largest = wanted.abs().max()
    assert (made["logits"] - wanted).abs().max() < 1e-5 * largest
    assert torch.equal(made["again"], made["logits"]) and made["hidden"].shape == (2, 13, 32)
    saved = open_checkpoint(tmp_path / "again")  # what transformers wrote, after a fine-tuning say, is ours again
    assert saved.model == model.config
    assert torch.equal(saved.source.read("model.embed.weight")[:320], model.embed.weight[:320])
    # Generation stops at eos; until then it is ours.
    ours = torch.stack(list(generate(model, tokens, max_new_tokens=20)), dim=1)
    assert torch.equal(made["cached"], made["uncached"])
    for row, expected in zip(made["cached"][:, 13:].tolist(), ours.tolist(), strict=True):
        length = row.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in row else 20
        assert row[:length] == expected[:length]
    assert found["ids"] == tokenizer.encode("def f(x):\n\treturn  x\n") and found["pad"] == 0
    wide = {name for name, dtype in found["dtypes"].items() if dtype == "torch.float32"}
    kept = ("norm.weight", "layernorm.weight", "decay_proj.weight", "decay_proj.bias", "lambda_raw")
    assert wide == {name for name in found["dtypes"] if name.endswith(kept)} and len(wide) > 8
    assert set(found["dtypes"].values()) == {"torch.float32", "torch.bfloat16"}
    assert 1e-3 < (made["half"] - wanted).abs().max() / largest < 0.2


def test_transformers_itself_confirms_a_folder_and_runs_no_code_in_it(tmp_path: Path) -> None:
    model = random_model(tiny(**CASES["grouped"]))
    folder, tokens = write_weights(tmp_path / "exported", model), tokens_of(1, 17)
    marker = tmp_path / "was run"
    (folder / hf_folder.MODELING).write_text(f"open({str(marker)!r}, 'w')\n")
    with torch.no_grad():
        wanted = model(tokens)
    assert (hf_folder.reference_logits(folder, tokens) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not marker.exists()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.lambda_raw"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lambda_raw"):
        hf_folder.reference_logits(folder, tokens)


def test_the_tool_exports_and_imports(make_checkpoint: Any, tmp_path: Path) -> None:
    made = make_checkpoint(vocab_size=320, vocab_multiple=100)
    tokenizer = train_tokenizer([make_text(i) for i in range(60)], tmp_path / "t.model", vocab_size=320)
    going = plan(made.folder, to="hf", tokenizer=tokenizer.path.read_bytes())
    lines = list(convert(going, tmp_path / "hf", how="full"))
    assert any("transformers" in line for line in lines), lines
    assert (tmp_path / "hf" / hf_folder.MODELING).read_bytes() == hf_folder.modeling_source()
    list(convert(plan(tmp_path / "hf", to="native"), tmp_path / "step_00000000", how="full"))
    assert list(convert(plan(tmp_path / "hf", to="safetensors"), tmp_path / "back.safetensors", how="full"))
    back = load_file(tmp_path / "back.safetensors")
    for name, parameter in made.model.named_parameters():
        wanted = parameter.detach().clone()
        if name in ("embed.weight", "head.weight"):
            wanted[made.model.config.vocab_size :] = 0
        assert torch.equal(back[f"model.{name}"], wanted), name


def test_names_swapped_both_ways_fail_the_export(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way back hides such a mistake: only the forward of transformers tells."""
    made = make_checkpoint(n_kv_heads=4)
    names = hf_sisa._SISA
    b, c = names["mixer.wb.weight"], names["mixer.wc.weight"]
    monkeypatch.setitem(names, "mixer.wb.weight", c)
    monkeypatch.setitem(names, "mixer.wc.weight", b)
    going = plan(made.folder, to="hf")
    list(convert(going, tmp_path / "hidden", how="blocks"))
    with pytest.raises(UserError, match="not the model read"):
        list(convert(going, tmp_path / "hf", how="full"))
    assert not (tmp_path / "hf").exists()
