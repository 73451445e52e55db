"""What a grid file of tools/run_sweep.py may say. Its keys are checked here; what they make is sweep_rules.py's.

name, output_dir      of the sweep: configs, runs and tables are made in output_dir
base                  a run's YAML without what the grid sets
sizes                 by name the keys of `model:` of a Transformer; every mixer and d_s meets its parameters by d_ff
lr, batch             a number, or a law in parameters, tokens, flops and width
warmup, decay         fractions of a run's steps
grids                 blocks; each is the product of its lists, with one of tokens, tokens_per_parameter and flops
machine               what the plan reckons with where no speed is measured, and what a SLURM script asks for
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from sisa_dist.config import UserError, parse_section, read_tree
from sisa_dist.config.section import Section

BUDGETS = ("tokens", "tokens_per_parameter", "flops")
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Law(Section):
    """coefficient · parameters^a · tokens^b · flops^c · d_model^d, of a run; a, b, c, d stand under these names."""

    coefficient: PositiveFloat
    parameters: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    d_model: float = 0.0
    at_least: PositiveFloat | None = None
    at_most: PositiveFloat | None = None

    def of(self, **variables: float) -> float:
        found = self.coefficient
        for name, value in variables.items():
            found *= value ** getattr(self, name)
        return min(max(found, self.at_least or 0.0), self.at_most or float("inf"))


class Block(Section):
    """The product of its lists."""

    name: str | None = None
    sizes: list[str] | None = Field(default=None, min_length=1)  # None: all
    mixers: list[str] = Field(min_length=1)  # of tools/compare_systems.py
    d_s: list[PositiveInt] | None = Field(default=None, min_length=1)  # of mixers that have one; None: half a head
    tokens: list[PositiveFloat] | None = Field(default=None, min_length=1)
    tokens_per_parameter: list[PositiveFloat] | None = Field(default=None, min_length=1)  # Chinchilla: 20
    flops: list[PositiveFloat] | None = Field(default=None, min_length=1)  # of the training: an IsoFLOP slice each
    lr: list[PositiveFloat] | None = Field(default=None, min_length=1)  # None: by the law
    batch: list[PositiveInt] | None = Field(default=None, min_length=1)  # tokens; None: by the law
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)

    @model_validator(mode="after")
    def _one_budget(self) -> Block:
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"a block says how long to train in one way: give one of {', '.join(BUDGETS)}")
        for key in ("sizes", "mixers", "d_s", *given, "lr", "batch", "seeds"):
            values = getattr(self, key) or []
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{key} names {twice[0]} twice: remove one")
        return self


class Machine(Section):
    """What one run has to itself."""

    devices: PositiveInt = 1
    devices_per_node: PositiveInt = 8
    peak_flops: PositiveFloat | None = None  # FLOP/s of a device
    mfu: Annotated[float, Field(gt=0.0, le=1.0)] | None = None  # of the peak, that training is taken to reach

    @model_validator(mode="after")
    def _consistent(self) -> Machine:
        if (self.peak_flops is None) != (self.mfu is None):
            raise ValueError("peak_flops and mfu say the speed together: give both, or neither")
        if self.devices > self.devices_per_node and self.devices % self.devices_per_node:
            raise ValueError(
                f"devices {self.devices} are no whole nodes of devices_per_node {self.devices_per_node}: make them so"
            )
        return self


class Grid(Section):
    name: str
    output_dir: str
    base: dict[str, Any]
    sizes: dict[str, dict[str, Any]] = Field(min_length=1)
    count: Literal["total", "non_embedding"] = "total"  # the parameters of tokens_per_parameter and of the laws
    lr: PositiveFloat | Law
    batch: PositiveInt | Law  # tokens of a step; a law's is rounded to what micro-batches allow
    d_ff_multiple: PositiveInt = 1  # what d_ff is rounded to; 8 and more keep a GPU's matrix units full
    warmup: Fraction = 0.02
    decay: Fraction | None = None  # of schedule wsd
    evaluations: PositiveInt = 10  # of held-out loss in a run
    checkpoints: PositiveInt = 5  # of a run
    grids: list[Block] = Field(min_length=1)
    machine: Machine = Machine()

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        for name in self.sizes:
            if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
                raise ValueError(f"sizes.{name}: a size's name is of letters, digits, . and -: rename it")
        for block in self.grids:
            unknown = [name for name in block.sizes or [] if name not in self.sizes]
            if unknown:
                raise ValueError(f"grids: there is no size {unknown[0]}: choose of {', '.join(self.sizes)}")
        return self


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Raises UserError, one line that names the key and the remedy."""
    tree = read_tree(path, overrides)
    for law in ("lr", "batch"):
        if isinstance(tree.get(law), dict):  # so that what is wrong in a law is not told of a number too
            parse_section(Law, tree[law], source=f"{path}: {law}")
    grid = parse_section(Grid, tree, source=str(path))
    for section, keys in SET_BY_THE_GRID.items():
        given = grid.base.get(section, {}) if section else grid.base
        for key in keys:
            if isinstance(given, dict) and key in given:
                at = f"{section}.{key}" if section else key
                raise UserError(f"{path}: base.{at} is the grid's to set: remove it ({keys[key]})")
    return grid


SET_BY_THE_GRID = {
    "": {"name": "name", "output_dir": "output_dir", "seed": "grids.seeds"},
    "model": dict.fromkeys(("d_model", "n_layers", "n_heads", "d_ff"), "sizes") | {"mixer": "grids.mixers"},
    "optimizer": {"lr": "lr"},
    "schedule": {"warmup_steps": "warmup", "decay_steps": "decay"},
    "training": {
        "steps": "grids.tokens",
        "global_batch_tokens": "batch",
        "eval_every": "evaluations",
        "checkpoint_every": "checkpoints",
    },
}
"""Keys of a run that `base` may not give, and the grid's own instead."""
