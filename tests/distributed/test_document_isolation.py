"""A training step over packed documents, from a real loader, is the step over the same documents each run alone.

Under tensor and sequence parallelism and both engines, against the plain model on one process that never sees two
documents at once: loss, gradient norm and every gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from data_pipeline.index import Index
from data_pipeline.loader import IGNORE, Batch, Loader
from data_pipeline.window import stack
from distributed.comparing import FP32
from distributed.grid import LR, TOKENS, VOCAB, Case, constants_with_noise
from distributed.pool import run_job
from distributed.probing import on_gradients
from mixer_cases import FIRST, mixer_of
from samples import EOS, write_split
from sisa_dist.config import RunConfig
from sisa_dist.engine import build_engine
from sisa_dist.model import build_model
from sisa_dist.model.mixers import MIXERS
from sisa_dist.parallel.mesh import init_mesh

LEAF = 8
# Tokens of each document without its eos: an eos alone, 1 and 2 tokens with it, a leaf and one less and more, several
# leaves, a whole window. None is longer than a window, so best_fit leaves all of them whole.
LENGTHS = [0, 1, 6, 7, 8, 38, 32, 14, 0, 39, 21, 2, 5, 30, 11, 9, 3, 17]


@dataclass(frozen=True)
class Packed:
    case: Case
    packing: str = "best_fit"
    path: str = "auto"

    def config(self) -> RunConfig:
        config = self.case.config()
        return config.model_copy(update={"attention": config.attention.model_copy(update={"path": self.path})})

    def __str__(self) -> str:
        engine = f"-zero{self.case.zero_stage}" if self.case.zero_stage is not None else ""
        return f"{self.case}-{self.packing}-{self.path}{engine}"


def _zero(stage: int) -> dict[str, Any]:
    return {"engine": (("kind", "deepspeed"), ("zero_stage", stage))}


CASES = [
    Packed(Case("tp1", "sisa", 2, "heterogeneous", "fp32")),
    Packed(Case("tp1", "attention", 2, "uniform", "fp32"), "concat"),
    Packed(Case("tp2", "sisa", 4, "uniform", "fp32"), "concat"),
    Packed(Case("tp2", "attention", 4, "uniform", "fp32", checkpointing=True)),
    Packed(Case("tp2_sp", "sisa", 1, "heterogeneous", "fp32", qk_norm=True)),
    Packed(Case("tp2_sp", "sisa", 2, "uniform", "fp32", checkpointing=True), path="single"),
    Packed(Case("tp2_sp", "attention", 2, "heterogeneous", "fp32", style="neox"), "concat"),
    Packed(Case("tp2", "sisa", 2, "uniform", "fp32", **_zero(1)), "concat"),
    Packed(Case("tp2_sp", "sisa", 4, "uniform", "fp32", **_zero(3))),
    Packed(Case("tp4", "sisa", 4, "heterogeneous", "fp32")),
    Packed(Case("tp4_sp", "sisa", 2, "uniform", "fp32", tied=False), "concat"),
    Packed(Case("tp4_sp", "attention", 4, "uniform", "fp32")),
    Packed(Case("tp2_dp2_sp", "sisa", 2, "heterogeneous", "fp32")),
    Packed(Case("tp2_dp2_sp", "attention", 1, "heterogeneous", "fp32", **_zero(3)), "concat"),
]
# The other mixers, two each; what is fast of them is in test_grid_rivals.py, whose reference is packed itself.
RIVALS = [name for mixer, name in FIRST.items() if mixer not in ("sisa", "attention")]
SLOW = [Packed(Case("tp2_sp", name, 2, "uniform", "fp32", **_zero(3))) for name in RIVALS]
SLOW += [Packed(Case("tp4", name, 2, "uniform", "fp32"), "concat") for name in RIVALS]


def test_every_mixer_is_packed_under_tp_and_under_both_engines() -> None:
    for mixer in MIXERS:
        mine = [packed.case for packed in CASES + SLOW if mixer_of(packed.case.mixer) == mixer]
        for wanted in ("tp2", "tp4", "_sp"):
            assert any(wanted in case.layout for case in mine), (mixer, wanted)
        assert len({case.zero_stage is None for case in mine}) == 2, mixer


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=gen).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def index(documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("packed")
    return write_split(folder / "train", documents, member_tokens=1000, vocab=VOCAB)


def windows(index: Index, packing: Any) -> list[Batch]:
    """One epoch from the loader, a window each; with one of padding if need be, so that two data ranks share it."""
    loader = Loader(
        index, seq_len=TOKENS, seed=0, global_batch_windows=1, micro_batch_size=1, packing=packing,
        document_mask=True, prefetch=0, lanes=1,
    )  # fmt: skip
    with loader.steps(0) as steps:
        found = [next(steps).micro_batches[0] for _ in range(loader.windows_per_epoch)]
    if len(found) % 2:
        empty = torch.full((1, TOKENS), EOS)
        found.append(Batch(empty, torch.full_like(empty, IGNORE), empty))
    return found


def alone(packing: str, documents: list[list[int]], served: list[Batch]) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of every document, told without a look at doc_ids or labels.

    best_fit holds the documents whole: they are taken as they were written. concat cuts them where a window ends: a
    window's tokens are parted behind each eos.
    """
    if packing == "best_fit":
        texts = [torch.tensor([[*ids, EOS]]) for ids in documents]
        return [(text[:, :-1], text[:, 1:]) for text in texts if text.shape[1] > 1]
    stream = torch.tensor([token for ids in documents for token in (*ids, EOS)])
    found = []
    for start in range(0, len(stream) - 1, TOKENS):
        part: list[int] = []
        window = stream[start : start + TOKENS + 1].tolist()
        for number, token in enumerate(window):
            part.append(token)
            if token == EOS or number == len(window) - 1:
                if len(part) > 1:
                    found.append((torch.tensor([part[:-1]]), torch.tensor([part[1:]])))
                part = []
    return found


def train_apart(packed: Packed, pieces: list[tuple[Tensor, Tensor]]) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and gradients of the plain model on one process, a document at a time."""
    with constants_with_noise():
        config = packed.config()
        model = build_model(config.model, attention=config.attention)
    total, count = 0.0, sum(labels.numel() for _, labels in pieces)
    for tokens, labels in pieces:
        loss, _ = model(tokens, labels)
        (loss / count).backward()
        total += loss.item() / count
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    return total, norm, gradients


def train_packed(packed: Packed, served: list[Batch]) -> tuple[float, float, int, dict[str, Tensor]]:
    """The same of one `Engine.train_step` on this group's ranks, two micro-batches each."""
    with constants_with_noise(), mock.patch("sisa_dist.ops.bisect.LEAF", LEAF):
        config = packed.config()
        mesh = init_mesh(config.parallel, device="cpu")
        engine = build_engine(config, mesh)
        gradients: list[dict[str, Tensor]] = []
        on_gradients(engine, gradients.append)
        mine = served[mesh.dp_rank :: mesh.dp_size]
        half = -(-len(mine) // 2)
        result = engine.train_step([stack(mine[:half]), stack(mine[half:])], LR)
    return result.loss, result.grad_norm, result.tokens, gradients[0]


def worst(packed: Packed, documents: list[list[int]], served: list[Batch]) -> dict[str, float]:
    """Term → error ÷ tolerance, of what is beyond it."""
    pieces = alone(packed.packing, documents, served)
    want_loss, want_norm, want = train_apart(packed, pieces)
    loss, norm, count, got = run_job(packed.case.world_size, train_packed, packed, served)[0]
    assert want.keys() == got.keys() and min(gradient.abs().max() for gradient in want.values()) > 0
    found = {"loss": abs(loss - want_loss) / FP32, "norm": abs(norm - want_norm) / want_norm / FP32}
    found["count"] = float(count != sum(labels.numel() for _, labels in pieces)) * 2
    # As in comparing.py a module's tensors share a scale; so do the gains inside a mixer, whose gradients are sums over
    # channels and may cancel: of Hymba's dt_norm here to a tenth, and 4e-9 of rounding are then too much.
    owner = {name: name.rsplit(".", 2 if "_norm." in name else 1)[0] for name in want}
    for name, gradient in want.items():
        scale = max(want[other].abs().max().item() for other in want if owner[other] == owner[name])
        found[name] = (got[name] - gradient).abs().max().item() / (FP32 * scale)
    return {name: error for name, error in found.items() if not error <= 1}


@pytest.mark.parametrize(
    "packed",
    [
        *sorted(CASES, key=lambda packed: packed.case.world_size),
        *(pytest.param(packed, marks=pytest.mark.slow) for packed in SLOW),
    ],
    ids=str,
)
def test_a_packed_step_is_the_documents_alone(packed: Packed, documents: list[list[int]], index: Index) -> None:
    assert not worst(packed, documents, windows(index, packed.packing))


@pytest.mark.parametrize("mistake", ["no mask", "shifted ids", "a label that crosses"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_mistake_in_packing_is_seen(packing: str, mistake: str, documents: list[list[int]], index: Index) -> None:
    packed = Packed(Case("tp1", "sisa", 4, "uniform", "fp32"), packing)
    served = windows(index, packing)
    wrong = []
    for batch in served:
        assert batch.doc_ids is not None
        doc_ids, labels = batch.doc_ids, batch.labels.clone()
        if mistake == "no mask":
            doc_ids = torch.zeros_like(doc_ids)
        elif mistake == "shifted ids":
            doc_ids = torch.cat((doc_ids[:, :1], doc_ids[:, :-1]), 1)
        else:
            crosses = (batch.tokens[:, :-1] == EOS) & (doc_ids.diff() > 0)
            labels[:, :-1][crosses] = batch.tokens[:, 1:][crosses]
        wrong.append(Batch(batch.tokens, labels, doc_ids))
    found = worst(packed, documents, wrong)
    assert "loss" in found and "blocks.0.mixer.wq.weight" in found, found
