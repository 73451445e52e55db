"""Proof that a conversion is right, before its result gets its name: bytes read back, logits compared, the way back.

Bytes are compared by whoever wrote them (`tensors.check_written`). Here are the checks that know models. What a table
of names gets wrong in both directions at once only the foreign library itself can tell: that is `full`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.convert.formats import architecture, reference_logits
from sisa_dist.convert.forward import fixed_tokens, logits
from sisa_dist.convert.opened import Opened
from sisa_dist.convert.recipe import Converted
from sisa_dist.convert.tensors import from_ours

Verify = Literal["auto", "blocks", "full"]

# Of the largest logit. The same operators on the same weights give the same bits; other operators (an upcycled model's
# score, a library's own attention) sum in another order: fp32 over a few thousand terms, through every layer.
SAME, OTHER = 1e-6, 1e-4


def verify(
    before: Opened, intended: Opened, after: Opened, *, how: Verify, whole: tuple[Opened, Path] | None
) -> Iterator[str]:
    """Lines that say what was checked and by how much it differs. Raises UserError at the first that is too much.

    `before` is what was read, `intended` what should have been written (the same model, or another made from it, in
    the dtype asked for) and `after` what was. `whole`: the side that is a Hugging Face folder and where it lies now.
    """
    tokens_BT = fixed_tokens(before.model)
    found = logits(after.source, after.model, tokens_BT)
    wanted = logits(intended.source, intended.model, tokens_BT)
    if not wanted.isfinite().all():
        raise UserError(f"{before.path}: its logits are not finite: a weight is NaN or inf, use another checkpoint")
    yield _line("logits of source and destination", *_difference(wanted, found, most=SAME))
    changed = before.model != intended.model
    if changed or is_rounded(before, intended):
        # Rounding to bf16 has no right size; it is shown.
        rounded = is_rounded(before, intended)
        original = logits(before.source, before.model, tokens_BT)
        name = "logits before and after rounding" if rounded else "logits of the old and the new architecture"
        yield _line(name, *_difference(original, wanted, most=None if rounded else OTHER))
    if before.foreign is not None and not changed and not is_rounded(before, after):
        yield f"{way_back(before, after)} tensors come back as they were when written out again"
    yield _full(after, found, tokens_BT, how=how, whole=whole)


def way_back(before: Opened, after: Opened) -> int:
    """Number of tensors of a foreign source that come out equal when the imported model is exported again."""
    assert before.foreign is not None
    recipes = from_ours(architecture(before.model_type).exports(after.model))
    back = Converted(after.without_moments().source, recipes)
    common = [name for name in back.specs if name in before.foreign.specs]
    for name in common:
        if not torch.equal(back.read(name).double(), before.foreign.read(name).double()):
            raise UserError(f"{name} was read one way and would be written another: the conversion is wrong")
    if not common:
        raise UserError(f"nothing of {before.path} would be written under its own name: the conversion is wrong")
    return len(common)


def _full(after: Opened, found: Tensor, tokens_BT: Tensor, *, how: Verify, whole: tuple[Opened, Path] | None) -> str:
    def skipped(why: str) -> str:
        if how == "full":
            raise UserError(f"--verify full is not possible: {why}: leave it out, or give --verify blocks")
        return f"not run whole by another library: {why}"

    if how == "blocks":
        return "not run whole by another library: --verify blocks"
    if whole is None:
        return skipped("no other library reads either side")
    if importlib.util.find_spec("transformers") is None:
        return skipped("transformers is not installed")
    opened, folder = whole
    needed, free = 4 * sum(spec.numel() for spec in opened.without_moments().source.specs.values()), free_memory()
    if how == "auto" and (free is None or needed > free // 2):
        half = "unknown" if free is None else f"{free / 2e9:.1f} GB"
        return skipped(f"it needs {needed / 1e9:.1f} GB, half the free memory is {half} (--verify full does it)")
    assert opened.model_type is not None
    wanted = reference_logits(architecture(opened.model_type), folder, tokens_BT)[..., : opened.model.vocab_size]
    return _line(
        "logits of the whole model in transformers and of the destination here", *_difference(wanted, found, most=OTHER)
    )


def _difference(a: Tensor, b: Tensor, *, most: float | None) -> tuple[float, float]:
    """(largest difference, largest logit). Raises UserError where it is more than `most` of the largest logit."""
    scale = a.abs().max().item()
    difference = (a.double() - b.double()).abs().max().item()
    # Not a > b: NaN is on neither side.
    if most is not None and not difference <= most * scale:
        raise UserError(
            f"the model written is not the model read: logits of fixed tokens differ by {difference:.3g}, the largest "
            f"is {scale:.3g}: nothing was kept"
        )
    return difference, scale


def _line(what: str, difference: float, scale: float) -> str:
    return f"{what}: they differ by at most {difference:.3g}, the largest is {scale:.3g}"


def is_rounded(before: Opened, after: Opened) -> bool:
    """Does `after` hold some weight in a dtype that cannot hold all of what `before` has?"""
    specs = before.source.specs
    return any(
        spec.dtype != specs[name].dtype and spec.dtype not in (torch.float32, torch.float64)
        for name, spec in after.source.specs.items()
        if name in specs
    )


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
