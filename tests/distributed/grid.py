"""The equivalence grid: what a case is, how it runs on a rank, and how it is compared with one process."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from data_pipeline.loader import Batch
from distributed.probing import on_gradients, weights
from mixer_cases import MIXTURES, RIVALS
from sisa_dist.config import RunConfig, parse_config
from sisa_dist.engine import build_engine
from sisa_dist.engine.gates import noise
from sisa_dist.engine.optim import build_optimizer
from sisa_dist.model import LM, build_model, loss
from sisa_dist.model.init import Constant, Normal
from sisa_dist.parallel.mesh import init_mesh

STEPS = 3
LR = 2e-3
WINDOWS, TOKENS = 4, 40
VOCAB = 61  # padded to 64: the last rank's slice has padding in it

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name → (world size, parallel block)
    "tp1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),
    "dp2": (2, {"dp": 2}),
    "tp2_dp2": (4, {"tp": 2, "dp": 2}),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "tp4_sp": (4, {"tp": 4, "sequence_parallel": True}),
    "tp2_dp2_sp": (4, {"tp": 2, "dp": 2, "sequence_parallel": True}),
    "hsdp_2x2": (4, {"dp": 4, "dp_replicate": 2}),
    "dp4": (4, {"dp": 4}),
    "ep2": (2, {"dp": 2, "ep": 2}),
    "ep2_dp4": (4, {"dp": 4, "ep": 2}),
    "ep4": (4, {"dp": 4, "ep": 4}),
    "cp2": (2, {"cp": 2}),
    "cp2_ring": (2, {"cp": 2, "cp_kind": "ring"}),
    "cp2_ulysses": (2, {"cp": 2, "cp_kind": "ulysses"}),
    "cp4": (4, {"cp": 4}),
    "cp4_ring": (4, {"cp": 4, "cp_kind": "ring"}),
    "cp4_ulysses": (4, {"cp": 4, "cp_kind": "ulysses"}),
    "cp2_dp2": (4, {"cp": 2, "dp": 2}),
    "cp2_dp2_ring": (4, {"cp": 2, "dp": 2, "cp_kind": "ring"}),
    "hsdp_cp2_2x1": (4, {"cp": 2, "dp": 2, "dp_replicate": 2}),
    "cp2_tp2": (4, {"cp": 2, "tp": 2}),
    "cp2_tp2_ulysses": (4, {"cp": 2, "tp": 2, "cp_kind": "ulysses"}),
    "cp2_tp2_sp": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    "cp2_tp2_sp_ring": (4, {"cp": 2, "tp": 2, "sequence_parallel": True, "cp_kind": "ring"}),
}


STYLES: dict[str, dict[str, Any]] = {  # blocks of other families, each with every bias it can have, and other RoPE
    "own": {},
    "llama": {"attention_bias": "all", "mlp_bias": True, "rotary_fraction": 0.5},
    "neox": {
        "norm": "layernorm",
        "mlp": "gelu",
        "attention_bias": "all",
        "mlp_bias": True,
        "rotary_fraction": 0.25,
        "parallel_residual": True,
    },
    "parallel": {"ffn": "parallel", "mlp_bias": True},
    "ssm_gated": {"ffn": "ssm_gated"},
    # RoPE stretched from 16 tokens to the grid's 40: with a temperature, and by the length of each document.
    "yarn": {
        "rotary_fraction": 0.5,
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            **{"beta_fast": 4.0, "beta_slow": 0.5},
        },
    },
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 16}},
    "priced": {"d_s": {"learned": True, "max": 8, "penalty": 5.0}},  # of learned_d_s
}


@dataclass(frozen=True)
class Case:
    """One point of the grid. The first five axes are the promise; the rest ride along in the covering subset."""

    layout: str
    mixer: str  # sisa | attention | one of RIVALS or MIXTURES
    n_kv_heads: int  # 4 is no GQA; 2 and 1 are held whole where tp is larger
    d_s: str  # uniform | heterogeneous (under attention: a sisa layer beside it)
    precision: str  # fp32 | bf16
    qk_norm: bool = False
    tied: bool = True
    documents: bool = False
    checkpointing: bool = False
    engine: tuple[tuple[str, Any], ...] = ()  # further keys of the engine block: options that change no number
    style: str = "own"  # of STYLES

    @property
    def zero_stage(self) -> int | None:
        options = dict(self.engine)
        return options.get("zero_stage", 3) if options.get("kind") == "deepspeed" else None

    @property
    def world_size(self) -> int:
        return LAYOUTS[self.layout][0]

    def config(self) -> RunConfig:
        rival = (RIVALS | MIXTURES).get(self.mixer)
        mixers, d_s = (
            (self.mixer, None)
            if rival is not None
            else {
                ("sisa", "uniform"): ("sisa", 8),
                ("sisa", "heterogeneous"): ("sisa", [4, 16]),
                ("attention", "uniform"): ("attention", None),
                ("attention", "heterogeneous"): (["attention", "sisa"], [0, 8]),
            }[self.mixer, self.d_s]
        )
        model = dict(vocab_size=VOCAB, vocab_multiple=16, d_model=32, n_layers=2, n_heads=4, d_ff=48, mixer=mixers)
        model |= dict(d_s=d_s, n_kv_heads=self.n_kv_heads, qk_norm=self.qk_norm, tie_embeddings=self.tied)
        return parse_config(
            {
                "model": model | {"init_std": 0.1} | (rival or {}) | STYLES[self.style],
                "attention": {"leaf": 8},  # several levels of the bisection within 40 tokens
                "parallel": LAYOUTS[self.layout][1],
                "engine": {"precision": self.precision, "activation_checkpointing": self.checkpointing}
                | dict(self.engine),
                # eps well above rounding noise: Adam turns noise in a vanishing gradient into a whole step of lr.
                "optimizer": {"lr": LR, "eps": 1e-5, "grad_clip": 0.5},
                "schedule": {"warmup_steps": 0},
                "training": {"steps": STEPS, "seq_len": TOKENS, "global_batch_tokens": WINDOWS * TOKENS},
            },
            source="grid",
        )

    def reference(self) -> Case:
        return dataclasses.replace(self, layout="tp1", engine=())

    def __str__(self) -> str:
        flags = [name for name in ("qk_norm", "untied", "documents", "checkpointing") if self._has(name)]
        flags += [self.style] * (self.style != "own")
        return "-".join([self.layout, self.mixer, f"kv{self.n_kv_heads}", self.d_s, self.precision, *flags])

    def _has(self, flag: str) -> bool:
        return not self.tied if flag == "untied" else getattr(self, flag)


AXES: dict[str, tuple[Any, ...]] = {
    # not ZeRO's, mixtures', or test_grid_context.py's
    "layout": tuple(name for name in LAYOUTS if name != "dp4" and "ep" not in name and "cp" not in name),
    "mixer": ("sisa", "attention"),
    "n_kv_heads": (4, 2, 1),
    "d_s": ("uniform", "heterogeneous"),
    "precision": ("fp32", "bf16"),
    "qk_norm": (False, True),
    "tied": (True, False),
    "documents": (False, True),
    "checkpointing": (False, True),
}
PROMISED = ("layout", "mixer", "n_kv_heads", "d_s", "precision")


def full_product() -> list[Case]:
    """Every combination of the promised axes, the riders dealt out in turn."""
    riders = itertools.cycle(itertools.product(*(AXES[axis] for axis in AXES if axis not in PROMISED)))
    return [Case(*values, *next(riders)) for values in itertools.product(*(AXES[axis] for axis in PROMISED))]


def covering_subset() -> list[Case]:
    """Cases in which every pair of values of two axes occurs, and every layout with sisa in fp32, which sees what bf16
    hides; of attention that is left to the full product. Chosen greedily and always the same."""
    names = list(AXES)
    together = [*itertools.combinations(range(len(names)), 2)]
    layout, mixer, precision = (names.index(axis) for axis in ("layout", "mixer", "precision"))

    def combinations(values: tuple[Any, ...]) -> set[tuple[tuple[int, Any], ...]]:
        found = {tuple((i, values[i]) for i in axes) for axes in together}
        if (values[mixer], values[precision]) == ("sisa", "fp32"):
            found.add(tuple((i, values[i]) for i in (layout, mixer, precision)))
        return found

    missing = set().union(*(combinations(values) for values in itertools.product(*AXES.values())))
    rng = np.random.Generator(np.random.Philox(key=[0, 0]))
    chosen = []
    while missing:
        wanted = dict(max(missing, key=lambda combination: (len(combination), repr(combination))))
        drawn = [
            tuple(wanted.get(i, AXES[axis][rng.integers(len(AXES[axis]))]) for i, axis in enumerate(names))
            for _ in range(200)
        ]
        best = max(drawn, key=lambda values: len(combinations(values) & missing))
        missing -= combinations(best)
        chosen.append(Case(*best))
    return chosen


@dataclass
class Outcome:
    """What one case gave, whole tensors; on ranks other than 0 it stays behind."""

    initial: dict[str, Tensor]
    log_prob: Tensor
    is_argmax: Tensor
    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]  # of the first step, before clipping
    final: dict[str, Tensor]


def run_case(case: Case, mutation: str | None = None, *, device: str = "cpu", steps: int = STEPS) -> Outcome | None:
    """Train `case` for clipped steps on the ranks of this process group, all of which have the same `case`."""
    from distributed.mutations import mutated

    # Six chunks of the loss in a batch, of 64 columns or a slice of them.
    chunks = mock.patch.multiple(loss, _CHUNK_ELEMENTS=1 << 11, _TIMES_HIDDEN=0)
    with constants_with_noise(), chunks, mutated(mutation) as mutate_engine:
        config = case.config()
        mesh = init_mesh(config.parallel, device=device)
        engine = build_engine(config, mesh)
        mutate_engine(engine)
        initial = weights(engine)
        everything = batch(case, 0)
        log_prob, is_argmax = engine.score(everything.tokens, everything.labels, everything.doc_ids)
        gradients: list[dict[str, Tensor]] = []
        on_gradients(engine, gradients.append)
        results = [
            engine.train_step(micro_batches(case, step, mesh.dp_rank, mesh.dp_size), LR) for step in range(steps)
        ]
        final = weights(engine)
    if not mesh.is_main:
        return None
    losses, norms = [result.loss for result in results], [result.grad_norm for result in results]
    return Outcome(initial, log_prob, is_argmax, losses, norms, gradients[0], final)


def run_plain(case: Case, *, steps: int = STEPS) -> Outcome:
    """The same training as a plain PyTorch loop, with nothing of ours but the model: the reference in fp32."""
    with constants_with_noise():
        config = case.config()
        model = build_model(config.model, attention=config.attention)
    initial = {name: x.detach().clone() for name, x in model.state_dict().items()}
    everything = batch(case, 0)
    with torch.no_grad():
        log_prob, is_argmax = model(everything.tokens, everything.labels, doc_ids_BT=everything.doc_ids, per_token=True)
    optimizer = build_optimizer(model, config.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        whole = batch(case, step)
        if model.gates is not None:
            model.gates.noise_LP = noise(config.seed, round(model.gates.step.item()), model.gates.log_alpha.shape)
        loss_sum, count = model(whole.tokens, whole.labels, doc_ids_BT=whole.doc_ids)
        (loss_sum / count).backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            stand = (
                group["gates"]
                and model.gates is not None
                and model.gates.share.item() >= model.gates.settings.anneal_until
            )
            group["lr"] = 0.0 if stand else LR * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad()
        _move_biases(model)
        _move_gates(model)
        losses.append((loss_sum / count).item())
        norms.append(norm.item())
    final = {name: x.detach().clone() for name, x in model.state_dict().items()}
    return Outcome(initial, log_prob, is_argmax, losses, norms, gradients, final)


def _move_biases(model: LM) -> None:
    """The bias of every router, by the rule itself: up by the rate where an expert got less than its share."""
    if model.config.moe is not None and model.config.moe.balance == "bias":
        assert model.routed is not None
        for row, layer in enumerate(model.routed_layers):
            counts = model.routed.counts_LE[row].tolist()
            for expert, count in enumerate(counts):
                fair = sum(counts) / len(counts)
                model.blocks[layer].mlp.router.bias[expert] += 0.001 * ((count < fair) - (count > fair))  # type: ignore
        model.reset_statistics()


def _move_gates(model: LM) -> None:
    """On by a step of STEPS."""
    if model.gates is not None:
        model.gates.step.copy_(round(model.gates.step.item()) + 1)
        model.gates.share.copy_(max(model.gates.share.item(), model.gates.step.item() / STEPS))


def batch(case: Case, step: int) -> Batch:
    """The global batch of a step. Windows have different numbers of labels that count, so an average over ranks that
    forgets this is seen."""
    rng = np.random.Generator(np.random.Philox(key=[step, 1]))
    window = torch.from_numpy(rng.integers(0, VOCAB, (WINDOWS, TOKENS + 1)))
    labels = window[:, 1:].clone()
    for row in range(WINDOWS):
        labels[row, : 7 * row] = -100
    starts = torch.from_numpy(rng.random((WINDOWS, TOKENS)) < 0.1)
    return Batch(window[:, :-1].contiguous(), labels, starts.cumsum(1) if case.documents else None)


def micro_batches(case: Case, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
    """This data rank's windows in two micro-batches, or one where it has a single window."""
    whole = batch(case, step)
    mine = torch.arange(dp_rank, WINDOWS, dp_size)
    return [
        Batch(whole.tokens[rows], whole.labels[rows], None if whole.doc_ids is None else whole.doc_ids[rows])
        for rows in mine.chunk(2)
    ]


@contextlib.contextmanager
def constants_with_noise() -> Iterator[None]:
    """Gains, biases and λ start unlike each other, or a slice from the wrong rank would change nothing."""
    real = Constant.draw

    def draw(self: Constant, key: bytes, start: int, stop: int) -> np.ndarray:
        return real(self, key, start, stop) + Normal(0.3).draw(key, start, stop)

    with mock.patch.object(Constant, "draw", draw):
        yield
