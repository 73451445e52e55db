"""What a Hugging Face folder of ours holds beside its weights and config.json, and how transformers itself reads it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.tokenizer_json import JsonTokenizer
from sisa_dist.config import UserError
from sisa_dist.convert.hf_tokenizer import NoEqualTokenizer, hf_tokenizer

MODELING = "modeling_sisa.py"


def modeling_source() -> bytes:
    """The code that travels with the weights of a SISA model."""
    return Path(__file__).with_name(MODELING).read_bytes()


def tokenizer_files(tokenizer: bytes | None, *, begins_with_eos: bool) -> dict[str, bytes]:
    """generation_config.json and the tokenizer's files, by name; `tokenizer` is the content of a tokenizer.model.

    `begins_with_eos`: the model was trained here, where a document begins after an eos; bos is then named so too.
    Where no equal tokenizer.json can be made, only tokenizer.model is kept, and a warning says why. Raises UserError
    for what is no SentencePiece model.
    """
    if tokenizer is None:
        return {}
    files = {"tokenizer.model": tokenizer}
    try:
        files |= hf_tokenizer(tokenizer, begins_with_eos=begins_with_eos)
    except NoEqualTokenizer as error:
        warnings.warn(str(error), stacklevel=2)
    return files | {"generation_config.json": _generation_config(tokenizer, begins_with_eos)}


def json_tokenizer_files(tokenizer: JsonTokenizer, *, begins_with_eos: bool) -> dict[str, bytes]:
    """The same for a tokenizer.json, which goes as it came; a written eos stays ordinary characters."""
    bos, bos_id = (tokenizer.eos, tokenizer.eos_id) if begins_with_eos else (tokenizer.bos, tokenizer.bos_id)
    unknown_id = tokenizer.unknown_id()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos,
        **({"bos_token": bos} if bos_id >= 0 else {}),
        **({"unk_token": tokenizer.piece(unknown_id)} if unknown_id >= 0 else {}),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    ids = {"bos_token_id": bos_id, "eos_token_id": tokenizer.eos_id}
    return {
        "tokenizer.json": tokenizer.model,
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps({name: i for name, i in ids.items() if i >= 0}, indent=2).encode(),
    }


def _generation_config(tokenizer: bytes, begins_with_eos: bool) -> bytes:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    # As in tokenizer_config.json: padding is never eos.
    pad = model.pad_id() if model.pad_id() >= 0 else model.unk_id()
    found = {
        "bos_token_id": model.eos_id() if begins_with_eos else model.bos_id(),
        "eos_token_id": model.eos_id(),
        "pad_token_id": pad,
    }
    return json.dumps({name: i for name, i in found.items() if i >= 0}, indent=2).encode()


def reference_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    """[B, T, vocab_size] fp32 of the SISA model in `folder`, loaded and run by transformers in fp32.

    Code that lies in the folder is never run: our own copy of it is what an export ships. Raises UserError where
    transformers finds a weight missing, left over or of another shape.
    """
    from sisa_dist.convert.modeling_sisa import SisaForCausalLM

    model, info = SisaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    for problem, names in info.items():
        if names:
            raise UserError(f"{folder}: transformers reports {problem}: {sorted(map(str, names))[0]}")
    with torch.no_grad():
        return model.eval()(tokens_BT, use_cache=False).logits.float()
