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
from sisa_dist.evaluation.heat_map import draw_positions, draw_retrieval
from sisa_dist.evaluation.perplexity import exp, perplexity
from sisa_dist.evaluation.retrieval import Retrieval
from sisa_dist.parallel.mesh import init_mesh
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training import by_length
from sisa_dist.training.run_data import ONLY, held_out_batches


def evaluate_checkpoint(
    run: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """(results, JSON path). `run` is a run or checkpoint folder; overrides apply to the config stored in it.

    Without held-out text, results["skipped"] says why there is no perplexity. Pictures of what evaluation.positions
    and evaluation.retrieval ask for stand beside the JSON. Raises UserError where nothing is left to evaluate, or the
    data was made with another tokenizer than the checkpoint's.
    """
    checkpoint = find_checkpoint(run)
    path = out or run_folder_of(checkpoint) / "evaluation.json"
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}: make it, or name another file")
    config = load_config(checkpoint / "config.yaml", overrides)
    check_tp(config.model, config.parallel.tp)
    tokenizer = load_tokenizer(checkpoint, max_vocab_size=config.model.vocab_size)
    held_out, without = _open_all(config, tokenizer, checkpoint)
    asked = config.evaluation
    if not held_out and asked.lambada is None and not asked.niah and asked.retrieval is None:
        why = "; ".join(without.values())
        raise UserError(f"nothing to evaluate: {why}, and none of evaluation.lambada, niah and retrieval is set")
    made = Retrieval(asked.retrieval, tokenizer, seed=config.seed) if asked.retrieval is not None else None
    timeout = timedelta(minutes=config.training.timeout_minutes)
    mesh = init_mesh(config.parallel, device=config.device, timeout=timeout)
    engine = build_engine(config, mesh)
    load_weights(checkpoint, engine, model=config.model, tokenizer=tokenizer, mesh=mesh)
    results: dict[str, Any] = {"checkpoint": str(checkpoint), "step": read_state(checkpoint).step}
    quiet = quiet or not mesh.is_main
    if held_out and config.data.mixture is None:
        ((train, validation),) = held_out.values()
        windows = asked.perplexity_windows
        batches = held_out_batches(config, validation, engine, batch_size=asked.batch_size, max_windows=windows)
        results |= evaluate(config, engine, tokenizer, batches, quiet=quiet)
        results["perplexity"]["unigram_perplexity"] = _baseline(config, train, validation)
    else:
        results |= evaluate(config, engine, tokenizer, None, quiet=quiet)
        if held_out:
            results["perplexity"] = _of_sources(config, held_out, engine, tokenizer, quiet=quiet)
    if asked.positions is not None and held_out:
        tables = by_length.positions(config, {n: split for n, (_, split) in held_out.items()}, engine, quiet=quiet)
        results["positions"] = by_length.as_record(config, tables)
        if mesh.is_main:
            picture = path.with_name(f"{path.stem}_positions.png")
            draw_positions(tables, picture, title=config.name, seq_len=config.training.seq_len)
    if made is not None:
        results["retrieval"] = by_length.retrieval(config, made, engine, quiet=quiet)
        if mesh.is_main:
            draw_retrieval(results["retrieval"], path.with_name(f"{path.stem}_retrieval.png"), title=config.name)
    if without:
        results["skipped"] = {
            "perplexity" if config.data.mixture is None else f"perplexity of {name}": why
            for name, why in without.items()
        }
    if asked.positions is not None and not held_out:
        results["skipped"]["positions"] = "; ".join(without.values())
    if mesh.is_main:
        write_results(path, results)
    return results, path


def _of_sources(
    config: RunConfig, held_out: Mapping[str, tuple[Index, Index]], engine: Engine, tokenizer: Tokenizer, *, quiet: bool
) -> dict[str, Any]:
    """All that is known of each source under `sources`; with all of them, loss and perplexity of the mixture."""
    shares, found = config.data.shares or {}, {}
    asked = config.evaluation
    for name, (train, validation) in held_out.items():
        batches = held_out_batches(
            config, validation, engine, batch_size=asked.batch_size, max_windows=asked.perplexity_windows
        )
        found[name] = asdict(perplexity(engine, batches, tokenizer=tokenizer, quiet=quiet))
        found[name]["unigram_perplexity"] = _baseline(config, train, validation)
    if found.keys() != {name for name, share in shares.items() if share}:
        return {"sources": found}  # a loss of some would pass for that of the mixture
    loss = sum(shares[name] * found[name]["loss"] for name in found) / sum(shares[name] for name in found)
    return {"loss": loss, "perplexity": exp(loss), "sources": found}


def _open_all(
    config: RunConfig, tokenizer: Tokenizer, checkpoint: Path
) -> tuple[dict[str, tuple[Index, Index]], dict[str, str]]:
    """(train, validation) of each source that is read and has held-out text; of the others, why there is none."""
    remote = remote_settings(config.data)
    if config.data.mixture is None:
        # The run may have been moved since, or this may be another folder than it was trained from.
        data = data_place(config.data.folder) if config.data.folder else run_folder_of(checkpoint) / "data"
        places = {ONLY: (data, "data.folder")}
    else:
        places = {
            name: (data_place(config.data.mixture[name].folder), f"data.mixture.{name}.folder")
            for name, share in (config.data.shares or {}).items()
            if share
        }
    opened = {
        name: _open_held_out(place, tokenizer, checkpoint, remote, key=key) for name, (place, key) in places.items()
    }
    return (
        {name: found for name, found in opened.items() if not isinstance(found, str)},
        {name: found for name, found in opened.items() if isinstance(found, str)},
    )


def _open_held_out(
    folder: Place, tokenizer: Tokenizer, checkpoint: Path, remote: RemoteSettings, *, key: str
) -> tuple[Index, Index] | str:
    """(train, validation), or why there is no held-out text."""
    train = open_split(folder, "train", remote=remote, absent_ok=True)  # only its counts are read
    if train is None:
        return f"no prepared data in {folder} (set {key} to where it is)"
    validation = open_split(folder, "validation", remote=remote)
    if any(split.tokenizer_sha256 != tokenizer.sha256 for split in (train, validation) if split is not None):
        raise UserError(
            f"{folder}: made with another tokenizer than {checkpoint} was trained with: set {key} to data "
            f"prepared with data.tokenizer.path={tokenizer.path}"
        )
    if validation is None:
        return f"the data in {folder} has no held-out text (data.validation_fraction 0)"
    return train, validation


def _baseline(config: RunConfig, train: Index, validation: Index) -> float:
    windows = config.evaluation.perplexity_windows
    most = None if windows is None else windows * config.training.seq_len
    return unigram_perplexity(train, validation, max_tokens=most, document_mask=config.data.document_mask)
