"""`sisa prepare`: documents → tokenizer → token shards of a training and a held-out split.

Everything is built in a folder beside and renamed, so what stands at data_folder is whole. prepared.json says what it
was made from: the same settings and inputs are up to date, others are an error unless forced.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from data_pipeline.shards import ShardWriter
from data_pipeline.sources import Corpus, Document
from data_pipeline.tokenizer import Tokenizer, token_dtype, train_tokenizer
from sisa_dist.config import RunConfig, UserError

_ENCODE_BATCH = 256  # documents handed to the tokenizer's threads at once


def prepare(config: RunConfig, *, force: bool = False, quiet: bool = False) -> Path:
    """Make the tokenizer and shards of `config` in its data folder and return that folder.

    Returns at once where they stand already. Raises UserError where the folder holds data of other settings (and not
    `force`), an input is damaged, or no document falls into the held-out split.
    """
    folder = config.data_folder
    corpus = Corpus(config.data.input, config.data.text_key)
    settings = _settings(config, corpus)
    console = Console(quiet=quiet, highlight=False)
    if (folder / "prepared.json").is_file() and not force:
        _compare(json.loads((folder / "prepared.json").read_text(encoding="utf-8"))["settings"], settings, folder)
        console.print(f"{folder}: up to date")
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / "prepared.json").is_file():
        raise UserError(f"{folder}: not empty and not made by `sisa prepare`: name another data.folder")
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tokenizer = _tokenizer(config, corpus, building / "tokenizer.model", console)
    counts = _write_splits(config, corpus, tokenizer, building, console)
    (building / "prepared.json").write_text(
        json.dumps({"settings": settings, "counts": counts}, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(building, folder)
    for split, count in counts.items():
        console.print(
            f"{folder / split}: {count['documents']:,} documents, {count['tokens']:,} tokens, "
            f"{count['bytes'] / max(1, count['tokens']):.2f} bytes a token"
        )
    return folder


def is_held_out(text: str, fraction: float) -> bool:
    """By a hash of the text, so that copies fall on the same side and no other document matters."""
    value = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    return value < fraction * 2**64


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
    with _progress("tokenizer: reading", console) as progress:
        task = progress.add_task("", total=min(settings.sample_bytes, corpus.total_bytes))

        def training_texts() -> Iterator[str]:
            # The whole corpus in order may be sorted by topic; every k-th document samples all of it within the bound.
            stride = max(1, corpus.total_bytes // settings.sample_bytes)
            kept = (d.text for d in corpus if not is_held_out(d.text, config.data.validation_fraction))
            taken = 0
            for text in islice(kept, 0, None, stride):
                taken += len(text.encode("utf-8", "surrogatepass"))
                progress.update(task, completed=taken)
                yield text
            progress.update(task, description="training (no bar: SentencePiece reports none)")

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
    with _progress("tokenising", console) as progress:
        task = progress.add_task("", total=corpus.total_bytes)
        for documents in _groups(corpus):
            texts = [document.text for document in documents]
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                split = "validation" if is_held_out(text, fraction) else "train"
                writers[split].add(ids)
                text_bytes[split] += len(text.encode("utf-8", "surrogatepass"))
            progress.update(task, completed=corpus.bytes_read)
    for split, made in writers.items():
        if made.documents == 0:
            raise UserError(
                f"data.validation_fraction {fraction}: no document fell into the {split} split: set it higher or "
                "lower, or to 0 for no held-out split, or give more documents (a .txt file is one)"
            )
    return {
        split: {"tokens": made.close(), "documents": made.documents, "bytes": text_bytes[split]}
        for split, made in writers.items()
    }


def _groups(corpus: Corpus) -> Iterator[list[Document]]:
    documents = iter(corpus)
    while group := list(islice(documents, _ENCODE_BATCH)):
        yield group


def _settings(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """Everything the bytes of the data depend on."""
    tokenizer = config.data.tokenizer
    own = tokenizer.path
    if own is not None and Path(own).is_file():
        own = hashlib.sha256(Path(own).read_bytes()).hexdigest()
    return {
        "data.input": [[file.name, file.size, file.mtime_ns] for file in corpus.files],
        "data.text_key": config.data.text_key,
        "data.tokenizer.path": own,
        "data.tokenizer.model_type": tokenizer.model_type,
        "data.tokenizer.sample_bytes": tokenizer.sample_bytes,
        "data.member_tokens": config.data.member_tokens,
        "data.shard_members": config.data.shard_members,
        "data.validation_fraction": config.data.validation_fraction,
        "model.vocab_size": config.model.vocab_size,
    }


def _compare(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    for key, value in new.items():
        if old.get(key) != value:
            said = "files changed" if key == "data.input" else f"{key} was {old.get(key)!r} and is now {value!r}"
            raise UserError(
                f"{folder}: made with other settings ({key}: {said}): name another data.folder or output_dir, or "
                "rebuild it with `sisa prepare --force`"
            )


def _progress(what: str, console: Console) -> Progress:
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    make: Callable[..., Progress] = Progress
    return make(*columns, TextColumn("{task.description}"), console=console, disable=console.quiet)
