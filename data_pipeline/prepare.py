"""`sisa prepare`: documents → tokenizer → token shards of a training and a held-out split.

Everything is built in a folder beside and renamed, so what stands at data_folder is whole. prepared.json (manifest.py)
says what it was made from: the same settings and inputs are up to date, others are an error unless forced.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_pipeline.building import built_beside
from data_pipeline.holdout import split_documents, split_value
from data_pipeline.manifest import check_inputs, check_settings, describe_inputs, read_manifest, write_manifest
from data_pipeline.shards import ShardWriter
from data_pipeline.sources import Corpus, Document
from data_pipeline.tokenizer import Tokenizer, token_dtype, train_tokenizer
from sisa_dist.config import RunConfig, UserError

_NOTHING_TO_TRAIN_ON = (
    "data.validation_fraction {}: every document was held out and none is left to train on: lower it, set it to 0, or "
    "name more text in data.input"
)
_GROUP_CHARACTERS = 2_000_000  # handed to the tokenizer's threads at once


def prepare(config: RunConfig, *, force: bool = False, quiet: bool = False) -> Path:
    """Make the tokenizer and shards of `config` in its data folder and return that folder.

    Returns at once where they stand already. Raises UserError where the folder holds data of other settings (and not
    `force`), an input is damaged, or no document falls into the held-out split.
    """
    if config.data.mixture is not None:
        raise UserError("data.mixture names folders that are prepared already: prepare each by a config of its own")
    folder = config.data_folder
    console = Console(quiet=quiet, highlight=False)
    made = read_manifest(folder)
    if made is not None and not force:
        check_settings(folder, config, model=True)
        unseen = check_inputs(folder, config)
        how = "" if unseen is None else f" by its settings; the input is not here ({unseen})"
        console.print(f"{folder}: up to date{how}")
        return folder
    if made is None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: not empty and not made by `sisa prepare`: name another data.folder")
    inputs, corpus = describe_inputs(config), Corpus(config.data.input, config.data.text_key)
    with built_beside(folder) as building:
        tokenizer = _tokenizer(config, corpus, building / "tokenizer.model", console)
        counts = _write_splits(config, corpus, tokenizer, building, console)
        write_manifest(building, config, inputs=inputs, counts=counts)
    for split, count in counts.items():
        console.print(
            f"{folder / split}: {count['documents']:,} documents, {count['tokens']:,} tokens, "
            f"{count['bytes'] / max(1, count['tokens']):.2f} bytes a token"
        )
    return folder


def _tokenizer(config: RunConfig, corpus: Corpus, path: Path, console: Console) -> Tokenizer:
    settings = config.data.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"data.tokenizer.path: {settings.path} has {tokenizer.vocab_size} pieces, model.vocab_size is "
                f"{config.model.vocab_size}: set model.vocab_size to {tokenizer.vocab_size}"
            )
        shutil.copyfile(settings.path, path)
        return Tokenizer.load(path)
    with _progress(console) as progress:
        task = progress.add_task("reading for the tokenizer", total=corpus.total_bytes)

        def training_texts() -> Iterator[str]:
            empty = True
            for held_out, document in split_documents(corpus, config.data.validation_fraction):
                progress.update(task, completed=corpus.bytes_read)
                if not held_out:
                    empty = False
                    yield document.text
            if empty:
                raise UserError(_NOTHING_TO_TRAIN_ON.format(config.data.validation_fraction))
            progress.update(task, description="training the tokenizer", completed=corpus.total_bytes)

        return train_tokenizer(
            training_texts(),
            path,
            vocab_size=config.model.vocab_size,
            model_type=settings.model_type,
            sample_bytes=settings.sample_bytes,
        )


def _write_splits(
    config: RunConfig, corpus: Corpus, tokenizer: Tokenizer, building: Path, console: Console
) -> dict[str, dict[str, int]]:
    def writer(split: str) -> ShardWriter:
        return ShardWriter(
            building / split,
            dtype=token_dtype(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer.sha256,
            member_tokens=config.data.member_tokens,
            shard_members=config.data.shard_members,
        )

    fraction = config.data.validation_fraction
    writers = {"train": writer("train")} | ({"validation": writer("validation")} if fraction else {})
    text_bytes = dict.fromkeys(writers, 0)
    lowest = 1.0
    with _progress(console) as progress:
        task = progress.add_task("tokenising", total=corpus.total_bytes)
        for group in _groups(split_documents(corpus, fraction)):
            texts = [document.text for _, document in group]
            for (held_out, document), ids in zip(group, tokenizer.encode_batch(texts), strict=True):
                split = "validation" if held_out else "train"
                writers[split].add(ids)
                text_bytes[split] += len(document.text.encode())
                lowest = min(lowest, split_value(document.text))
            progress.update(task, completed=corpus.bytes_read)
    if writers["train"].documents == 0:
        raise UserError(_NOTHING_TO_TRAIN_ON.format(fraction))
    if fraction and writers["validation"].documents == 0:
        raise UserError(
            f"data.validation_fraction {fraction}: no document was held out: set it to at least "
            f"{math.ceil(lowest * 1e4 + 1) / 1e4:g}, to 0 for no held-out split, or name more documents in data.input"
        )
    return {
        split: {"tokens": made.close(), "documents": made.documents, "bytes": text_bytes[split]}
        for split, made in writers.items()
    }


def _groups(documents: Iterator[tuple[bool, Document]]) -> Iterator[list[tuple[bool, Document]]]:
    """In lists that keep the tokenizer's threads busy without holding much text."""
    group, length = [], 0
    for held_out, document in documents:
        group.append((held_out, document))
        length += len(document.text)
        if length >= _GROUP_CHARACTERS:
            yield group
            group, length = [], 0
    if group:
        yield group


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description:<25}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=console.quiet)
