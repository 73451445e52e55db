"""The loaders that `benchmark.py data` compares, each as its own documentation has it used, behind one small interface.

Each serves one epoch of the same tokens as batches (tokens, labels) [rows, seq_len] int64 in host memory, shuffled as
finely as it can, so that the inputs of an epoch are the whole corpus once. What they cannot do alike is in `NOTES`.
It measures nothing: see data_child.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.index import Index
from data_pipeline.loader import IGNORE, Loader
from data_pipeline.prepared import open_split
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.shards import ShardWriter

EOS, VOCAB = 2, 32_000
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """rows windows of seq_len tokens in a batch; `step` batches make an optimizer step; `workers` read."""

    rows: int
    seq_len: int
    step: int
    workers: int


class Reader(Protocol):
    def epoch(self) -> Batches:
        """The next epoch, or what is left of the one that `state` was taken in."""
        ...

    def state(self) -> dict[str, Any] | None:
        """JSON to go on from behind the batch last served; None: it can only start over."""
        ...


class Ours:
    """`workers`: data.read_threads, threads of the training process that make optimizer steps ahead."""

    requires = ""

    @staticmethod
    def write(tokens: NDArray[np.uint16], folder: Path, *, seq_len: int, member_tokens: int) -> None:
        writer = ShardWriter(
            folder / "train",
            dtype=tokens.dtype,
            vocab_size=VOCAB,
            eos_id=EOS,
            tokenizer_sha256="none",
            member_tokens=member_tokens,
            shard_members=256,
        )
        ends = np.flatnonzero(tokens == EOS)
        for start, stop in zip([0, *(ends[:-1] + 1).tolist()], ends.tolist(), strict=True):
            writer.add(tokens[start:stop])
        writer.close()

    def __init__(self, place: str, shape: Shape, state: dict[str, Any] | None = None) -> None:
        index = open_split(place, "train")
        assert isinstance(index, Index)
        index.cache_bytes = 0  # of members kept in memory, which would hold a corpus as small as this one
        self._shape, self._cursor = shape, state["cursor"] if state else 0
        self._loader = Loader(
            index,
            seq_len=shape.seq_len,
            seed=0,
            global_batch_windows=shape.rows * shape.step,
            micro_batch_size=shape.rows,
            read_threads=shape.workers,
        )

    def epoch(self) -> Batches:
        epoch = self._loader.windows_per_epoch
        end = (self._cursor // epoch + 1) * epoch
        assert epoch % (self._shape.rows * self._shape.step) == 0
        with self._loader.steps(self._cursor) as steps:
            while self._cursor < end:
                step = next(steps)
                self._cursor = step.next_cursor
                for batch in step.micro_batches:
                    yield batch.tokens, batch.labels

    def state(self) -> dict[str, Any]:
        return {"cursor": self._cursor}


class MemoryMap:
    """The floor: np.memmap, a permutation of the windows, one copy each for tokens and labels.

    One worker is the training process itself, with no reading ahead and nothing handed over; two are two threads.
    """

    requires = ""

    @staticmethod
    def write(tokens: NDArray[np.uint16], folder: Path, *, seq_len: int, member_tokens: int) -> None:
        tokens.tofile(folder / "tokens.bin")

    def __init__(self, place: str, shape: Shape, state: dict[str, Any] | None = None) -> None:
        self._data = np.memmap(Path(place) / "tokens.bin", np.uint16, mode="r")
        self._shape, self._epoch, self._at = shape, *(state["place"] if state else (0, 0))

    def epoch(self) -> Batches:
        order = np.random.default_rng(self._epoch).permutation(len(self._data) // self._shape.seq_len)
        batches = order.reshape(-1, self._shape.rows).tolist()
        if self._shape.workers == 1:
            while self._at < len(batches):
                yield self._batch(batches[self._at])
                self._at += 1
        else:
            first, last = self._at, len(batches) - 1
            made = ReadAhead(
                lambda number: self._batch(batches[min(first + number, last)]), ahead=16, threads=self._shape.workers
            )
            with made:
                for self._at in range(first, len(batches)):
                    yield next(made)
        self._epoch, self._at = self._epoch + 1, 0

    def _batch(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        length, data = self._shape.seq_len, self._data
        tokens = torch.stack([torch.from_numpy(data[w * length : (w + 1) * length].astype(np.int64)) for w in windows])
        rows = []
        for w in windows:
            row = data[w * length + 1 : (w + 1) * length + 1].astype(np.int64)
            rows.append(torch.from_numpy(row if len(row) == length else np.append(row, IGNORE)))
        return tokens, torch.stack(rows)

    def state(self) -> dict[str, Any]:
        return {"place": [self._epoch, self._at + 1]}


class WebDataset:
    """Our tars through webdataset's own pipeline; `workers` are DataLoader processes, which share out the tars."""

    requires = "webdataset"
    write = Ours.write

    def __init__(self, place: str, shape: Shape, state: dict[str, Any] | None = None) -> None:
        import webdataset

        if place.startswith("http"):
            from fsspec import open as fsspec_open

            with fsspec_open(f"{place}/train/index.json") as file:
                shards = json.load(file)["shards"]
            urls = [f"{place}/train/{shard['name']}" for shard in shards]
        else:
            urls = [str(path) for path in sorted(Path(place, "train").glob("*.tar"))]

        def cut(samples: Iterator[dict[str, Any]]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
            for sample in samples:
                ids = np.frombuffer(sample["bin"], "<u2").astype(np.int64)
                labels = np.append(ids[1:], IGNORE)  # the token after a member is in another sample
                for start in range(0, len(ids), shape.seq_len):
                    yield ids[start : start + shape.seq_len], labels[start : start + shape.seq_len]

        pipeline = webdataset.WebDataset(
            urls, shardshuffle=100, nodesplitter=webdataset.split_by_node, empty_check=False
        )
        pipeline = pipeline.compose(cut).shuffle(1000).batched(shape.rows, collation_fn=_stack_pairs)
        self._loader = _data_loader(pipeline, shape)

    def epoch(self) -> Batches:
        return iter(self._loader)

    def state(self) -> None:
        return None


class Streaming:
    """MosaicML Streaming: a sample is a window with the token behind it; `workers` are DataLoader processes."""

    requires = "streaming"

    @staticmethod
    def write(tokens: NDArray[np.uint16], folder: Path, *, seq_len: int, member_tokens: int) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(folder), columns={"ids": f"ndarray:uint16:{seq_len + 1}"}, progress_bar=False) as out:
            padded = np.append(tokens, np.uint16(EOS))
            for start in range(0, len(tokens), seq_len):
                out.write({"ids": padded[start : start + seq_len + 1]})

    def __init__(self, place: str, shape: Shape, state: dict[str, Any] | None = None) -> None:
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()  # of a run that was killed
        dataset = StreamingDataset(local=place, batch_size=shape.rows, shuffle=True, shuffle_seed=0)
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=shape.rows,
            num_workers=shape.workers,
            collate_fn=_shift_samples,
            persistent_workers=True,
        )
        if state:
            self._loader.load_state_dict(state)

    def epoch(self) -> Batches:
        return iter(self._loader)

    def state(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._loader.state_dict()
        return found


class LitData:
    """LitData's TokensLoader: blocks of seq_len; `workers` are DataLoader processes."""

    requires = "litdata"

    @staticmethod
    def write(tokens: NDArray[np.uint16], folder: Path, *, seq_len: int, member_tokens: int) -> None:
        from functools import partial

        from litdata import optimize
        from litdata.streaming.item_loader import TokensLoader

        tokens.tofile(folder.parent / "litdata.bin")
        span = seq_len * max(1, 2**20 // seq_len)
        optimize(
            fn=partial(_read_span, str(folder.parent / "litdata.bin"), span),
            inputs=list(range(-(-len(tokens) // span))),
            output_dir=str(folder),
            chunk_size=8 * span,
            num_workers=1,
            item_loader=TokensLoader(),
        )
        (folder.parent / "litdata.bin").unlink()

    def __init__(self, place: str, shape: Shape, state: dict[str, Any] | None = None) -> None:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming.item_loader import TokensLoader

        dataset = StreamingDataset(
            input_dir=place, item_loader=TokensLoader(block_size=shape.seq_len), shuffle=True, seed=0, drop_last=False
        )
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=shape.rows,
            num_workers=shape.workers,
            collate_fn=_shift_blocks,
            persistent_workers=True,
        )
        if state:
            self._loader.load_state_dict(state)

    def epoch(self) -> Batches:
        return iter(self._loader)

    def state(self) -> dict[str, Any] | None:
        found: dict[str, Any] = self._loader.state_dict()
        return found


KINDS: dict[str, Any] = {
    "ours": Ours,
    "memory map": MemoryMap,
    "webdataset": WebDataset,
    "streaming": Streaming,
    "litdata": LitData,
}
NOTES = {
    "ours": "members and windows in an exact order at any number of ranks; a state is one integer; content hashed",
    "memory map": "a permutation of the windows; nothing checked; a state is an integer",
    "webdataset": "tars shuffled, then a buffer of 1000 windows; no state: it starts over and skips; nothing checked",
    "streaming": "py1e shuffle of samples; state exact; nothing checked (hashes are off by default)",
    "litdata": "chunks and the blocks in them shuffled; the last label of each window is missing; nothing checked",
}


def _data_loader(dataset: Any, shape: Shape) -> Any:
    return torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=shape.workers, persistent_workers=True, prefetch_factor=4
    )


def _stack_pairs(rows: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> tuple[Tensor, Tensor]:
    tokens, labels = zip(*rows, strict=True)
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(labels))


def _shift_samples(samples: list[dict[str, NDArray[np.uint16]]]) -> tuple[Tensor, Tensor]:
    ids = np.stack([sample["ids"] for sample in samples])
    return torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(ids[:, 1:].astype(np.int64))


def _shift_blocks(blocks: list[Any]) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(np.stack([np.asarray(block) for block in blocks]).astype(np.int64))
    labels = torch.full_like(tokens, IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    return tokens, labels


def _read_span(path: str, span: int, number: int) -> Tensor:
    return torch.from_numpy(np.fromfile(path, np.uint16, count=span, offset=2 * number * span))
