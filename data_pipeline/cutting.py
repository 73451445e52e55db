"""The second half of `sisa prepare`: partitions of the shuffled documents to shards, and the parts to one index.

A partition is an equal range of shuffle keys. Its documents are read in the order of their keys and written as members
and shards of its own, numbered on from those of the partitions before: known beforehand from the token counts, so that
any process can write any partition. How many partitions there are depends on how much text there is, nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index_writer import IndexWriter
from data_pipeline.runs import Run, kept, partition_of, partition_start, read_documents
from data_pipeline.shards import Part, ShardWriter
from data_pipeline.tokenizer import token_dtype
from data_pipeline.workers import Report


class Cut(NamedTuple):
    """One partition's job."""

    partition: int
    documents: int
    tokens: int
    first_member: int
    first_shard: int


@dataclass(frozen=True)
class SplitPlan:
    """All partitions of a split; sent to each worker once."""

    split: str
    partitions: int
    cuts: Sequence[Cut]  # of the partitions that are not empty
    text_bytes: int
    runs: Sequence[Run]
    dropped: Sequence[Path | None]  # see runs.read_documents
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    member_tokens: int
    shard_members: int
    folder: Path  # where the shards go
    parts: Path  # where the notes of finished partitions go
    group_bytes: int  # ids held at once

    @property
    def documents(self) -> int:
        return sum(cut.documents for cut in self.cuts)

    @property
    def tokens(self) -> int:
        return sum(cut.tokens for cut in self.cuts)


def count(
    runs: Sequence[Run], dropped: Sequence[Path | None], partitions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """(documents, tokens with their eos) of each partition, and bytes of text. Holds the records of one slice."""
    documents, tokens, text_bytes = np.zeros(partitions, np.int64), np.zeros(partitions, np.int64), 0
    for run, mask in zip(runs, dropped, strict=True):
        records = kept(run.records(), mask)
        where = partition_of(records["key"], partitions)
        documents += np.bincount(where, minlength=partitions)
        # Sums of doubles, exact below 2^53.
        tokens += np.bincount(where, records["tokens"] + 1.0, minlength=partitions).astype(np.int64)
        text_bytes += int(records["bytes"].sum())
    return documents, tokens, text_bytes


def lay_out(
    documents: NDArray[np.int64], tokens: NDArray[np.int64], *, member_tokens: int, shard_members: int
) -> list[Cut]:
    """Where each partition's members and shards begin."""
    cuts, member, shard = [], 0, 0
    for partition in np.flatnonzero(documents).tolist():
        cuts.append(Cut(partition, int(documents[partition]), int(tokens[partition]), member, shard))
        members = -(-int(tokens[partition]) // member_tokens)
        member, shard = member + members, shard - (-members // shard_members)
    return cuts


def cut_partition(plan: SplitPlan, cut: Cut, report: Report) -> None:
    """Writes the shards of one partition and, last, its notes. Tokens are reported."""
    dtype = token_dtype(plan.vocab_size)
    writer = ShardWriter(
        plan.folder,
        dtype=dtype,
        vocab_size=plan.vocab_size,
        eos_id=plan.eos_id,
        tokenizer_sha256=plan.tokenizer_sha256,
        member_tokens=plan.member_tokens,
        shard_members=plan.shard_members,
        first_member=cut.first_member,
        first_shard=cut.first_shard,
    )
    low, high = (partition_start(partition, plan.partitions) for partition in (cut.partition, cut.partition + 1))
    waiting = 0
    for ids in read_documents(plan.runs, low, high, dtype=dtype, dropped=plan.dropped, group_bytes=plan.group_bytes):
        writer.add(ids)
        waiting += len(ids) + 1
        if waiting > 1 << 18:
            report(waiting)
            waiting = 0
    part = writer.finish()
    assert (part.documents, int(part.token_counts.sum())) == (cut.documents, cut.tokens)
    report(waiting)
    partial = _notes(plan, cut).with_name(f"{_notes(plan, cut).name}.partial-{os.getpid()}")
    with open(partial, "wb") as file:
        np.savez(
            file,
            members=part.members,
            segments=part.segments,
            token_counts=part.token_counts,
            shards=np.array(json.dumps(part.shards)),
        )
    os.replace(partial, _notes(plan, cut))


def is_cut(plan: SplitPlan, cut: Cut) -> bool:
    """Whether the partition's shards stand, every byte of them."""
    try:
        part = _load_part(plan, cut)
        return all((plan.folder / shard["name"]).stat().st_size == shard["bytes"] for shard in part.shards)
    except (OSError, ValueError, KeyError):
        return False


def join_parts(plan: SplitPlan) -> None:
    """The index of the split. Holds its members' rows; the documents' lengths go through a file."""
    writer = IndexWriter(plan.folder, plan.parts / f"{plan.split}.segments", vocab_size=plan.vocab_size)
    for cut in plan.cuts:
        writer.add(_load_part(plan, cut))
    assert writer.documents == plan.documents
    writer.close(
        {
            "dtype": token_dtype(plan.vocab_size).str,
            "vocab_size": plan.vocab_size,
            "eos_id": plan.eos_id,
            "tokenizer_sha256": plan.tokenizer_sha256,
        }
    )


def left_to_cut(plan: SplitPlan) -> Iterator[Cut]:
    return (cut for cut in plan.cuts if not is_cut(plan, cut))


def _notes(plan: SplitPlan, cut: Cut) -> Path:
    return plan.parts / f"{plan.split}-{cut.partition:06d}.npz"


def _load_part(plan: SplitPlan, cut: Cut) -> Part:
    with np.load(_notes(plan, cut)) as found:
        shards: list[dict[str, Any]] = json.loads(str(found["shards"]))
        return Part(cut.documents, shards, found["members"], found["segments"], found["token_counts"])
