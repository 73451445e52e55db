"""Evaluate a checkpoint by its run's config: builds the engine, loads the weights, runs the harness.

The model and its tokenizer are the checkpoint's. Prepared data is needed for perplexity alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from data_pipeline.baseline import unigram_perplexity
from data_pipeline.fetch import RemoteSettings
from data_pipeline.index import Index
from data_pipeline.places import Place, data_place
from data_pipeline.prepared import open_split, remote_settings
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.checkpoint import find_checkpoint, load_tokenizer, load_weights, read_state, run_folder_of
from sisa_dist.config import RunConfig, UserError, load_config
from sisa_dist.engine import Engine, build_engine
from sisa_dist.evaluation.harness import evaluate, write_results
from sisa_dist.evaluation.perplexity import exp, perplexity
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.run_data import ONLY, held_out_batches


def evaluate_checkpoint(
    run: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """(results, JSON path). `run` is a run or checkpoint folder; overrides apply to the config stored in it.

    Without held-out text, results["skipped"] says why there is no perplexity. Raises UserError where nothing is left
    to evaluate, or the data was made with another tokenizer than the checkpoint's.
    """
    checkpoint = find_checkpoint(run)
    path = out or run_folder_of(checkpoint) / "evaluation.json"
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}: make it, or name another file")
    config = load_config(checkpoint / "config.yaml", overrides)
    check_tp(config.model, config.parallel.tp)
    tokenizer = load_tokenizer(checkpoint, max_vocab_size=config.model.vocab_size)
    held_out = _open_all(config, tokenizer, checkpoint)
    asked = config.evaluation
    if isinstance(held_out, str) and asked.lambada is None and not asked.niah:
        raise UserError(f"nothing to evaluate: {held_out}, and neither evaluation.lambada nor evaluation.niah is set")
    timeout = timedelta(minutes=config.training.timeout_minutes)
    mesh = init_mesh(config.parallel, device=config.device, timeout=timeout)
    engine = build_engine(config, mesh)
    load_weights(checkpoint, engine, model=config.model, tokenizer=tokenizer, mesh=mesh)
    results: dict[str, Any] = {"checkpoint": str(checkpoint), "step": read_state(checkpoint).step}
    quiet = quiet or not mesh.is_main
    if isinstance(held_out, str):
        results |= evaluate(config, engine, tokenizer, None, quiet=quiet) | {"skipped": {"perplexity": held_out}}
    elif config.data.mixture is None:
        ((train, validation),) = held_out.values()
        windows = asked.perplexity_windows
        batches = held_out_batches(config, validation, engine, batch_size=asked.batch_size, max_windows=windows)
        results |= evaluate(config, engine, tokenizer, batches, quiet=quiet)
        results["perplexity"]["unigram_perplexity"] = _baseline(config, train, validation)
    else:
        results |= evaluate(config, engine, tokenizer, None, quiet=quiet)
        results["perplexity"] = _of_sources(config, held_out, engine, tokenizer, quiet=quiet)
    if mesh.is_main:
        write_results(path, results)
    return results, path


def _of_sources(
    config: RunConfig, held_out: Mapping[str, tuple[Index, Index]], engine: Engine, tokenizer: Tokenizer, *, quiet: bool
) -> dict[str, Any]:
    """Loss and perplexity of a mixture, by its shares, and all that is known of each source under `sources`."""
    shares, found = config.data.shares or {}, {}
    asked = config.evaluation
    for name, (train, validation) in held_out.items():
        batches = held_out_batches(
            config, validation, engine, batch_size=asked.batch_size, max_windows=asked.perplexity_windows
        )
        found[name] = asdict(perplexity(engine, batches, tokenizer=tokenizer, quiet=quiet))
        found[name]["unigram_perplexity"] = _baseline(config, train, validation)
    loss = sum(shares[name] * found[name]["loss"] for name in found) / sum(shares[name] for name in found)
    return {"loss": loss, "perplexity": exp(loss), "sources": found}


def _open_all(config: RunConfig, tokenizer: Tokenizer, checkpoint: Path) -> dict[str, tuple[Index, Index]] | str:
    """(train, validation) of each source that is read and has held-out text, or why there is none."""
    if config.data.mixture is None:
        # The run may have been moved since, or this may be another folder than it was trained from.
        data = data_place(config.data.folder) if config.data.folder else run_folder_of(checkpoint) / "data"
        held_out = _open_held_out(data, tokenizer, checkpoint, remote_settings(config.data))
        return held_out if isinstance(held_out, str) else {ONLY: held_out}
    found, missing = {}, []
    for name, share in (config.data.shares or {}).items():
        if share:
            opened = _open_held_out(
                data_place(config.data.mixture[name].folder), tokenizer, checkpoint, remote_settings(config.data)
            )
            if isinstance(opened, str):
                missing.append(opened)
            else:
                found[name] = opened
    return found or "; ".join(missing)


def _open_held_out(
    folder: Place, tokenizer: Tokenizer, checkpoint: Path, remote: RemoteSettings
) -> tuple[Index, Index] | str:
    """(train, validation), or why there is no held-out text."""
    train = open_split(folder, "train", remote=remote, absent_ok=True)  # only its counts are read
    if train is None:
        return f"no prepared data in {folder} (set data.folder to where it is)"
    validation = open_split(folder, "validation", remote=remote)
    if any(split.tokenizer_sha256 != tokenizer.sha256 for split in (train, validation) if split is not None):
        raise UserError(
            f"{folder}: made with another tokenizer than {checkpoint} was trained with: set data.folder to data "
            f"prepared with data.tokenizer.path={tokenizer.path}"
        )
    if validation is None:
        return f"the data in {folder} has no held-out text (data.validation_fraction 0)"
    return train, validation


def _baseline(config: RunConfig, train: Index, validation: Index) -> float:
    windows = config.evaluation.perplexity_windows
    most = None if windows is None else windows * config.training.seq_len
    return unigram_perplexity(train, validation, max_tokens=most, document_mask=config.data.document_mask)
