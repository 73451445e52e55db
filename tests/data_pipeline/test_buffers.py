"""Memory is given out again when, and only when, no view of it is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.buffers import Buffers
from data_pipeline.loader import Loader
from samples import random_documents, write_split


def addresses(arrays: list[Any]) -> list[int]:
    return [array.__array_interface__["data"][0] for array in arrays]


def test_what_nobody_holds_is_given_out_again() -> None:
    buffers = Buffers((2, 3), arrays=2, most=2)
    first = buffers.take()
    at = addresses(first)
    assert not set(addresses(buffers.take())) & set(at)
    tensors = [torch.from_numpy(array) for array in first]
    row = tensors[1][1][1:]
    del first, tensors
    others = [buffers.take() for _ in range(3)]
    assert not {address for arrays in others for address in addresses(arrays)} & set(at), "a view of it is held"
    del row
    assert addresses(buffers.take()) == at


def test_no_more_is_kept_than_asked() -> None:
    buffers = Buffers((2, 3), arrays=1, most=1)
    held = [buffers.take() for _ in range(4)]
    first, others = addresses(held[0]), held[1:]
    del held
    assert addresses(buffers.take()) == first and len(others) == 3


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_batch_that_is_held_never_changes(tmp_path: Path, threads: int, document_mask: bool) -> None:
    index = write_split(tmp_path / "train", random_documents(1, 40))
    loader = Loader(
        index,
        seq_len=7,
        seed=5,
        global_batch_windows=4,
        micro_batch_size=2,
        prefetch=3,
        read_threads=threads,
        document_mask=document_mask,
    )
    held, copies = [], []
    with loader.steps(0) as steps:
        for number in range(60):
            step = next(steps)
            if number % 3 == 0:  # the others go, and their memory is used again
                part = step.micro_batches[1].labels[1]
                held.append(part)
                copies.append(part.clone())
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert len({np.asarray(part).tobytes() for part in held}) > 10
