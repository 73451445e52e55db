"""prepared.json: what a data folder was made from, and whether that is what a config asks for.

Settings are compared as the config spells them, so that training can do it on a machine that never saw the text. The
input files' sizes and times are compared by `sisa prepare` alone. The run's seed has no part in either, so that runs
that differ in the seed share one folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.index import FORMAT_VERSION
from data_pipeline.inputs import InputFile, list_files
from data_pipeline.passes import evaluation_files
from data_pipeline.sizes import Sizes
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import DataConfig, RunConfig, UserError

_MANIFEST_VERSION = 3  # 1 held the files in place of data.input; 2 was of documents that were not shuffled
_REMEDY = "set it to what was prepared, name another data.folder, or rebuild it with `sisa prepare --force`"


def write_manifest(
    folder: Path,
    config: RunConfig,
    *,
    inputs: dict[str, Any],
    counts: dict[str, dict[str, int]],
    skipped: dict[str, int],
    passes: dict[str, Any] | None = None,
) -> None:
    """`inputs`: from describe_inputs, before the first byte was read, so that a later change is seen.

    counts: documents, tokens, bytes of text of each split; skipped: what was no text, by reason; passes: their
    Counts.as_dict.
    """
    manifest = {"settings": _settings(config), "inputs": inputs, "counts": counts, "skipped": skipped}
    manifest |= {"passes": passes} if passes is not None else {}
    (folder / "prepared.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def write_derived(
    folder: Path,
    made_by: str,
    *,
    sources: list[dict[str, Any]],
    counts: dict[str, dict[str, int]],
    skipped: dict[str, int],
    passes: dict[str, Any] | None = None,
) -> None:
    """prepared.json of a folder that no config made: `made_by` is the command that did.

    sources: folder, fingerprint, tokens, and settings where it has any, of what it was made from.
    """
    settings = {"format": [FORMAT_VERSION, _MANIFEST_VERSION]}
    manifest = {"made_by": made_by, "settings": settings, "counts": counts, "skipped": skipped, "sources": sources}
    manifest |= {"passes": passes} if passes is not None else {}
    (folder / "prepared.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def made_elsewise(manifest: dict[str, Any]) -> str | None:
    """The command that made a folder from others' shards; None: `sisa prepare` made it from text."""
    made_by: str | None = manifest.get("made_by")
    return made_by


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where `folder` holds none. Raises UserError where it is damaged."""
    path = folder / "prepared.json"
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        manifest["settings"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: cannot be read, it is damaged: remove the folder {folder}") from None
    return manifest


def check_settings(folder: Path, config: RunConfig, *, model: bool = False) -> None:
    """Raises UserError where `folder` is not prepared, or with other data settings than the config's.

    `model`: with model.vocab_size among them. A model may have more ids than the tokenizer; data made anew would not.
    """
    made = read_manifest(folder)
    if made is None:
        raise UserError(f"{folder}: no prepared data here: run `sisa prepare` with this config first")
    if made_by := made_elsewise(made):
        _check_derived(folder, config, made, made_by)
        return
    for key, value in _settings(config).items():
        old = made["settings"].get(key)
        if old != value and (model or not key.startswith("model.")):
            raise UserError(f"{folder}: made with other settings ({key} was {old!r} and is now {value!r}): {_REMEDY}")


def _check_derived(folder: Path, config: RunConfig, made: dict[str, Any], made_by: str) -> None:
    """Settings that shape data have no effect on data that no config shaped: they are as in a source, or not set."""
    usual = _settings(config.model_copy(update={"data": DataConfig()}))
    for key, value in _settings(config).items():
        known = [source["settings"].get(key) for source in made.get("sources", ()) if "settings" in source]
        if key == "format" and made["settings"].get(key) != value:
            raise UserError(
                f"{folder}: of format {made['settings'].get(key)}, this version reads {value}: make it anew"
            )
        if key.startswith("data.") and value not in (usual[key], *known):
            raise UserError(f"{folder}: made by `{made_by}`, on which {key} has no effect: remove it, or name another")


def check_inputs(folder: Path, config: RunConfig) -> str | None:
    """None where the input files are those `folder` was made from; why not, where they cannot be compared here.

    Raises UserError where they changed.
    """
    made = read_manifest(folder)
    assert made is not None
    if made_by := made_elsewise(made):
        return f"it was made by `{made_by}`"
    try:
        found = describe_inputs(config)
    except UserError as error:
        return str(error)
    for key, value in found.items():
        if made.get("inputs", {}).get(key) != value:
            raise UserError(
                f"{folder}: the files of {key} changed since it was made: name another data.folder or output_dir, or "
                "rebuild it with `sisa prepare --force`"
            )
    return None


def work_key(config: RunConfig, inputs: dict[str, Any], sizes: Sizes) -> str:
    """Equal for equal settings, inputs and sizes: whether what a killed `sisa prepare` left is worth going on with.

    data.on_bad is left out, so that a bad document found late can be skipped without starting over.
    """
    settings = {name: value for name, value in _settings(config).items() if name != "data.on_bad"}
    return hashlib.blake2b(json.dumps([settings, inputs, asdict(sizes)]).encode(), digest_size=8).hexdigest()


def describe_inputs(config: RunConfig, files: list[InputFile] | None = None) -> dict[str, Any]:
    """What tells today's input files from others of the same names. `files`: of data.input, where listed already."""
    tokenizer = config.data.tokenizer.path
    sha256 = tokenizer and Tokenizer.load(tokenizer, eos=config.data.tokenizer.eos).sha256
    found = _identities(list_files(config.data.input) if files is None else files)
    described = {"data.input": found, "data.tokenizer.path": sha256}
    if compared := evaluation_files(config):
        described["data.passes.decontaminate"] = _identities(list_files(compared))
    return described


def _identities(files: list[InputFile]) -> list[list[Any]]:
    return [[file.name, file.size, file.mtime_ns] for file in files]


def _settings(config: RunConfig) -> dict[str, Any]:
    """Everything in the config that the bytes of the data depend on."""
    data = config.data
    return {
        "format": [FORMAT_VERSION, _MANIFEST_VERSION],
        "data.input": [data.input] if isinstance(data.input, str) else data.input,
        "data.text_key": data.text_key,
        "data.on_bad": data.on_bad,
        "data.tokenizer.path": data.tokenizer.path,
        "data.tokenizer.eos": data.tokenizer.eos,
        "data.tokenizer.model_type": data.tokenizer.model_type,
        "data.tokenizer.sample_bytes": data.tokenizer.sample_bytes,
        "data.member_tokens": data.member_tokens,
        "data.shard_members": data.shard_members,
        "data.validation_fraction": data.validation_fraction,
        "data.shuffle_seed": data.shuffle_seed,
        "data.passes": data.passes.model_dump(mode="json", exclude_none=True),
        "model.vocab_size": config.model.vocab_size,
    }
