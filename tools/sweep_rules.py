"""From a grid to its runs: every one the config of an ordinary `sisa train`, by the grid's rules.

- d_ff is solved for, so that within a size all mixers and d_s have the size's parameters (to 0.5 %);
- tokens are given, or so many to a parameter, or what a budget of FLOPs leaves (an IsoFLOP slice);
- lr and batch come from the grid's laws where a block does not list them, as they are for the size's Transformer: all
  mixers and d_s of one size and budget train with the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compare_systems import TOLERANCE, choose, lay_over, mixers_of, systems
from equal_parameters import parameters, solve_d_ff
from sweep_grid import BUDGETS, Block, Grid, Law

from sisa_dist.config import ModelConfig, RunConfig, UserError, parse_config
from sisa_dist.config.load import merge
from sisa_dist.config.mixers import MIXER_NAMES
from sisa_dist.model.flops import training_flops_per_token
from sisa_dist.training.run_folder import keys_that_count


@dataclass(frozen=True)
class Shape:
    """A model of the grid with what its parameters come to."""

    size: str
    mixer: str  # the system's name
    config: RunConfig  # its schedule, lr and steps are no run's
    parameters: int
    parameters_non_embedding: int
    flops_per_token: float  # of training
    transformer: Shape | None = None  # of this size, which laws and Chinchilla multiples go by; None: it is that

    @property
    def d_s(self) -> int | None:
        """None where there is none, or not one for all layers."""
        found = {d_s for d_s in self.config.model.layer_d_s if d_s}
        return found.pop() if len(found) == 1 and self.config.model.learned_d_s is None else None


@dataclass(frozen=True, eq=False)  # a config has lists, which have no hash
class SweepRun:
    name: str
    shape: Shape
    config: RunConfig

    @property
    def tokens(self) -> int:
        return self.config.training.steps * self.config.training.global_batch_tokens

    @property
    def flops(self) -> float:
        return self.shape.flops_per_token * self.tokens

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @cached_property
    def config_hash(self) -> str:
        return config_hash(self.config)


def config_hash(config: RunConfig) -> str:
    """16 hexadecimal digits of all that alters the result of a run or of its last evaluation.

    Not what lies in data.folder or a mixture's folders, where a grid names them: keep those as they are. data.input
    too, as it is spelled, though a run may go on without: it does so on the data it was begun with, which tell
    themselves by their fingerprint, and a finished run does not look at them again. Nothing is lost by it, since a
    folder that was prepared from an input of another spelling is refused in training as well.
    """
    given = config.data.input
    keys = keys_that_count(config) | {"evaluation": config.evaluation.model_dump()}
    keys |= {"data.input": [given] if isinstance(given, str) else given}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


def make_runs(grid: Grid) -> list[SweepRun]:
    """In the grid's order; one that two blocks ask for stands where it was asked for first.

    Raises UserError where a size, a d_s or a budget cannot be met, and where two runs would have one name.
    """
    transformers: dict[str, Shape] = {}
    shapes: dict[tuple[str, str, int | None], Shape] = {}
    found: dict[str, SweepRun] = {}
    for block in grid.grids:
        for size, mixer, d_s in _models(grid, block):
            if (size, mixer, d_s) not in shapes:
                if size not in transformers:
                    transformers[size] = _counted(base_config(grid, size), size, "attention")
                shapes[size, mixer, d_s] = _matched(grid, transformers[size], mixer, d_s)
            for run in _runs_of(grid, block, shapes[size, mixer, d_s], d_s):
                found.setdefault(run.config_hash, run)
    named: dict[str, SweepRun] = {}
    for run in found.values():
        if named.setdefault(run.name, run) is not run:
            raise UserError(
                f"grids: two runs that differ would both be {run.name}: a name has 4 digits of a budget and of lr: "
                "round them, or leave one out"
            )
    return list(found.values())


def _models(grid: Grid, block: Block) -> Iterator[tuple[str, str, int | None]]:
    try:
        mixers = choose(block.mixers, everything=False)
    except UserError as error:
        raise UserError(f"grids.mixers{str(error).removeprefix('--systems')}") from None
    with_d_s = [name for name in mixers if _takes_d_s(name)]
    if block.d_s and not with_d_s:
        raise UserError(f"grids.d_s has no effect, none of {', '.join(mixers)} takes one: remove it")
    for size in block.sizes or grid.sizes:
        for mixer in mixers:
            for d_s in (block.d_s or [None]) if mixer in with_d_s else [None]:
                yield size, mixer, d_s


def _takes_d_s(name: str) -> bool:
    keys = systems()[name]
    return "d_s" not in keys and any("d_s" in MIXER_NAMES[mixer] for mixer in mixers_of(keys))


def _matched(grid: Grid, transformer: Shape, mixer: str, d_s: int | None) -> Shape:
    size, base, target = transformer.size, transformer.config, transformer.parameters
    where = f"size {size}, {mixer}" + (f", d_s {d_s}" if d_s else "")
    keys = systems()[mixer] | ({"d_s": d_s} if d_s else {})

    def with_d_ff(d_ff: int) -> RunConfig:
        try:
            return lay_over(base, keys, d_ff=d_ff)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    d_ff = solve_d_ff(with_d_ff, target)
    if d_ff is None:
        raise UserError(f"{where}: no layer has an MLP, whose width makes mixers equal: leave model.mlp as it is")
    if d_ff < 1:
        least = parameters(with_d_ff(1))
        raise UserError(
            f"{where}: with next to no MLP it has {least:,} parameters and the size {target:,}: raise the size's d_ff, "
            "or leave this one out"
        )
    d_ff = max(1, round(d_ff / grid.d_ff_multiple)) * grid.d_ff_multiple
    found = _counted(with_d_ff(d_ff), size, mixer, transformer)
    if abs(found.parameters / target - 1) > TOLERANCE:
        raise UserError(
            f"{where}: {found.parameters:,} parameters at d_ff {d_ff} and the size has {target:,} ± {TOLERANCE:.1%}: "
            "a column of the MLPs, or d_ff_multiple, is too coarse: make the size larger, or that smaller"
        )
    return found


def _counted(config: RunConfig, size: str, mixer: str, transformer: Shape | None = None) -> Shape:
    found = parameters(config)
    flops = training_flops_per_token(config.model, config.training.seq_len)
    return Shape(size, mixer, config, found, found - embedding_parameters(config.model), flops, transformer)


def base_config(grid: Grid, size: str) -> RunConfig:
    """The size's Transformer, with a schedule that fits any number of steps."""
    own: dict[str, Any] = {"model": {"mixer": "attention"} | grid.sizes[size], "output_dir": grid.output_dir}
    own["schedule"] = {"warmup_steps": 0}
    schedule = grid.base.get("schedule", {})
    if isinstance(schedule, dict) and schedule.get("kind") == "wsd":
        if not grid.decay:
            raise UserError("decay is missing and schedule.kind is wsd: set it, for example to 0.2")
        own["schedule"]["decay_steps"] = 1
    elif grid.decay is not None:
        raise UserError("decay has no effect unless base.schedule.kind is wsd: remove it, or set that")
    training = grid.base.get("training", {})
    training = training if isinstance(training, dict) else {}
    sizes = training.get("seq_len", 2048), training.get("micro_batch_size", 1)
    unit = sizes[0] * sizes[1] if all(type(size) is int for size in sizes) else 1  # which it is told of below
    own["training"] = {"steps": 10**9, "global_batch_tokens": max(1, unit)}
    return parse_config(merge(grid.base, own), source=f"base, size {size}")


def embedding_parameters(model: ModelConfig) -> int:
    """Of the embedding and, where it is not tied, of the head."""
    return model.padded_vocab_size * model.d_model * (1 if model.tie_embeddings else 2)


def _runs_of(grid: Grid, block: Block, shape: Shape, d_s: int | None) -> Iterator[SweepRun]:
    (budget,) = (key for key in BUDGETS if getattr(block, key) is not None)
    assert shape.transformer is not None
    reference = shape.transformer
    counted = reference.parameters if grid.count == "total" else reference.parameters_non_embedding
    for value, lr, batch, seed in itertools.product(
        getattr(block, budget), block.lr or [None], block.batch or [None], block.seeds
    ):
        tokens = {
            "tokens": value,
            "tokens_per_parameter": value * counted,
            "flops": value / shape.flops_per_token,
        }[budget]
        label = {"tokens": f"t{short(value)}", "flops": f"c{short(value)}"}.get(budget, f"{value:g}x")
        parts = [shape.size, shape.mixer, f"ds{d_s}" if d_s else "", label]
        parts += [f"lr{short(lr)}" if lr else "", f"b{batch}" if batch else "", f"s{seed}"]
        name = "_".join(part for part in parts if part)
        theirs = value / reference.flops_per_token if budget == "flops" else tokens
        variables = {"parameters": float(counted), "tokens": theirs, "flops": theirs * reference.flops_per_token}
        variables["d_model"] = float(reference.config.model.d_model)
        batch = batch or _batch(grid, shape.config, variables)
        lr = lr or (grid.lr.of(**variables) if isinstance(grid.lr, Law) else grid.lr)
        yield SweepRun(name, shape, _config(grid, shape, name, tokens, float(f"{lr:.4g}"), batch, seed))


def _batch(grid: Grid, config: RunConfig, variables: dict[str, float]) -> int:
    """A law's, rounded to what micro-batches on every data rank allow, and at least one of each."""
    if not isinstance(grid.batch, Law):
        return grid.batch
    parallel, training = config.parallel, config.training
    ranks = parallel.dp or max(1, grid.machine.devices // (parallel.tp * parallel.cp))
    unit = training.seq_len * training.micro_batch_size * ranks
    return max(1, round(grid.batch.of(**variables) / unit)) * unit


def _config(grid: Grid, shape: Shape, name: str, tokens: float, lr: float, batch: int, seed: int) -> RunConfig:
    steps = round(tokens / batch)
    if steps < 1:
        raise UserError(f"{name}: {tokens:,.0f} tokens are fewer than one step of {batch:,}: give more, or lower batch")
    tree = shape.config.model_dump()
    folder = Path(grid.output_dir) / "runs" / name
    tree |= {"name": f"{grid.name}-{name}", "output_dir": str(folder), "seed": seed}
    tree["optimizer"]["lr"] = lr
    tree["schedule"]["warmup_steps"] = round(grid.warmup * steps)
    if grid.decay is not None:
        tree["schedule"]["decay_steps"] = max(1, round(grid.decay * steps))
    tree["training"] |= {"steps": steps, "global_batch_tokens": batch}
    tree["training"] |= {"eval_every": math.ceil(steps / grid.evaluations)}
    tree["training"] |= {"checkpoint_every": math.ceil(steps / grid.checkpoints)}
    if tree["data"]["mixture"] is None and tree["data"]["folder"] is None:
        tree["data"]["folder"] = str(Path(grid.output_dir) / "data")
    return parse_config(tree, source=name)


def short(value: float) -> str:
    return f"{value:.4g}".replace("e+", "e").replace("e0", "e").replace("e-0", "e-")
