"""One checkpoint made from another: planned from headers, written beside its place, verified there, renamed last."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from data_pipeline.tokenizer import JSON_CONFIG, SENTENCEPIECE, SentencePieceTokenizer, Tokenizer
from data_pipeline.tokenizer_json import names_in
from sisa_dist.checkpoint.manifest import NAME as MANIFEST
from sisa_dist.config import ModelConfig, RunConfig, UserError, sync
from sisa_dist.convert.formats import format_module, open_checkpoint
from sisa_dist.convert.materialise import gone, kept_pairs, materialised
from sisa_dist.convert.materialise import recipes as fixed_recipes
from sisa_dist.convert.opened import DATA, STATE, Opened, Target, fp32_parameters
from sisa_dist.convert.recipe import Converted, Recipes, TensorSource
from sisa_dist.convert.tensors import MODEL, Cast, Noted, check_written, from_ours, num_bytes, origins, to_ours
from sisa_dist.convert.upcycle import recipes, upcycle
from sisa_dist.convert.upcycle_experts import expert_recipes, upcycle_experts
from sisa_dist.convert.verify import Verify, is_rounded, verify

_MARK = "made by convert_checkpoint"

Tell = Callable[[str, str, int], None]  # (phase: "write" or "read back", tensor, bytes)
Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Plan:
    """What a conversion will write. Nothing has been read but headers."""

    before: Opened
    intended: Opened  # the model to write, under our names, in the dtypes asked for
    made: TensorSource  # the same under the names of the format
    to: str
    target: Target

    @property
    def bytes(self) -> int:
        return sum(num_bytes(spec) for spec in self.made.specs.values())

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """(name, shape, dtype, the tensors of the source it is made from) of every tensor to write."""
        for name, spec in self.made.specs.items():
            made_from = ", ".join(origins(self.made, name)) or "nothing: new"
            yield name, str(list(spec.shape)), str(spec.dtype).removeprefix("torch."), made_from


def plan(
    path: Path,
    *,
    to: str,
    format: str | None = None,
    dtype: Dtype = "fp32",
    moments: bool | None = None,
    d_s: int | list[int] | None = None,
    experts: tuple[int, int] | None = None,
    materialise: Literal["cut", "to_mlp"] | None = None,
    tokenizer: Tokenizer | bytes | None = None,
    config: RunConfig | None = None,
    target: Target | None = None,
) -> Plan:
    """The conversion of what lies at `path` to the format `to`. Opens headers only.

    `moments` None: kept where `to` is for going on with training. `d_s`, one or one per layer: a Transformer is
    upcycled to a SISA model that computes the same. `experts` (number, top_k): so is its MLP, to a mixture of experts.
    `materialise`: a model of learned d_s becomes one of fixed d_s, with to_mlp and wider MLPs for what that saves.
    bf16 rounds matrices; gains, decays and λ stay fp32.
    `tokenizer` as bytes is a SentencePiece model. Raises UserError for what cannot be done.
    """
    module, before, target = format_module(to), open_checkpoint(path, format=format, config=config), target or Target()
    if tokenizer is not None:
        if isinstance(tokenizer, bytes):
            tokenizer = SentencePieceTokenizer(tokenizer, Path(f"--tokenizer {SENTENCEPIECE}"))
        before = before.with_tokenizer(tokenizer)
    kept = before.tokenizer
    if kept is not None and kept.vocab_size > before.model.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {kept.vocab_size} ids, the model {before.model.vocab_size}: give the model's "
            "own by --tokenizer"
        )
    if dtype != "fp32" and module.MASTERS:
        raise UserError(f"--dtype {dtype}: a {to} checkpoint holds fp32 weights: leave --dtype out")
    if moments and not module.HOLDS_MOMENTS:
        raise UserError(f"--moments: the format {to} holds weights only: leave it out")
    if moments and not before.has_moments:
        raise UserError(f"--moments: {path} holds none: leave it out")
    keep = module.MASTERS if moments is None else moments
    intended = before if keep else before.without_moments()
    if moments and (d_s is not None or experts is not None):
        raise UserError("--moments: what is new in an upcycled model has none: leave it out")
    if d_s is not None:
        intended = upcycled(intended.without_moments(), d_s=d_s)
    if experts is not None:
        intended = with_experts(intended.without_moments(), experts=experts[0], top_k=experts[1])
    if materialise is not None:
        intended = with_fixed_d_s(intended.without_moments(), to_mlp=materialise == "to_mlp")
    wide = fp32_parameters(intended.model) if dtype == "bf16" else frozenset()

    def dtype_of(name: str) -> torch.dtype:
        return torch.bfloat16 if dtype == "bf16" and name.startswith(MODEL) and name not in wide else torch.float32

    intended = replace(intended, source=Cast(intended.source, dtype_of))
    return Plan(before, intended, module.made(intended, target), to, target)


def upcycled(opened: Opened, *, d_s: int | list[int]) -> Opened:
    """The SISA model that begins where the Transformer `opened` stands, at step 0."""
    return _grown(opened, upcycle(opened.model, d_s=d_s), recipes(opened.model, d_s=d_s))


def with_experts(opened: Opened, *, experts: int, top_k: int) -> Opened:
    """The mixture of experts that begins where the dense model `opened` stands, at step 0."""
    sizes = {"experts": experts, "top_k": top_k}
    return _grown(opened, upcycle_experts(opened.model, **sizes), expert_recipes(opened.model, **sizes))


def with_fixed_d_s(opened: Opened, *, to_mlp: bool) -> Opened:
    """The model of fixed d_s that begins where `opened`, of learned d_s, stands, at step 0."""
    kept = kept_pairs(opened.model, opened.source)
    made = fixed_recipes(opened.model, kept, to_mlp=to_mlp)
    return _grown(opened, materialised(opened.model, kept, to_mlp=to_mlp), made, dropped=gone(opened.model, made))


def _grown(opened: Opened, model: ModelConfig, made: Recipes, *, dropped: frozenset[str] = frozenset()) -> Opened:
    files = {name: content for name, content in opened.files.items() if name not in (STATE, DATA)}
    source = Converted(opened.source, to_ours(from_ours(made)), dropped=dropped)
    return replace(opened, model=model, source=source, files=files, foreign=None)


def convert(
    plan: Plan, destination: Path, *, how: Verify = "auto", tell: Tell = lambda phase, name, size: None
) -> Iterator[str]:
    """Carries `plan` out; yields a line for each check passed. When it ends, `destination` is there, whole and checked.

    Raises UserError, and leaves nothing behind, where `destination` exists, the disk fails or a check does.
    """
    check_destination(plan, destination)
    module, parent = format_module(plan.to), destination.parent
    _clear(destination)
    try:
        # Of a name that nobody else has: a folder of the user's may be called anything.
        folder = Path(tempfile.mkdtemp(prefix=_prefix(destination), suffix=f".{os.getpid()}", dir=parent))
    except OSError as error:
        raise UserError(f"{parent}: cannot be written ({error.strerror}): mend or name another") from None
    staging = folder / destination.name
    try:
        (folder / _MARK).write_text(socket.gethostname(), encoding="utf-8")
        plan.before.check(plan.intended.has_moments)
        noted = Noted(plan.made, seen=lambda name, size: tell("write", name, size))
        module.write(staging, plan.intended, noted, plan.target)
        found = Noted(module.stored(staging), seen=lambda name, size: tell("read back", name, size))
        check_written(noted.hashes, found, what=str(destination))
        yield f"{len(noted.hashes)} tensors, {plan.bytes / 1e9:.3f} GB, read back as they were written"
        after = module.open_checkpoint(staging)
        if _tokenizer_of(after) != _tokenizer_of(plan.intended):
            raise UserError(f"{destination}: the tokenizer reads back other than it was written: try another disk")
        yield from verify(plan.before, plan.intended, after, how=how, whole=_whole(plan, after, staging))
        staging.rename(destination)
        sync(parent)
    except UserError as error:
        raise UserError(str(error).replace(str(staging), str(destination))) from error
    except OSError as error:
        raise UserError(f"{destination}: cannot be written ({error.strerror}): make room or mend the folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_destination(plan: Plan, destination: Path) -> None:
    """Raises UserError where `convert` would have no place to write to."""
    parent = destination.parent
    if os.path.lexists(destination):
        raise UserError(f"{destination}: is there already: remove it, or name another")
    if not parent.is_dir():
        raise UserError(f"{parent}: no such folder: make it first")
    for folder in (parent.resolve(), *parent.resolve().parents):
        if (folder / MANIFEST).is_file():
            raise UserError(f"{destination}: lies inside the checkpoint {folder}: name a place outside")
    if plan.to == "safetensors" and destination.suffix != ".safetensors":
        raise UserError(
            f"{destination}: a safetensors file is known by its ending: name it {destination.name}.safetensors"
        )
    free = shutil.disk_usage(parent).free
    if free < plan.bytes:
        raise UserError(f"{parent}: {plan.bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free: make room")


def _prefix(destination: Path) -> str:
    return f".{destination.name}.converting."


def _clear(destination: Path) -> None:
    """Removes what a kill of this program, on this host, left behind."""
    for folder in destination.parent.glob(f"{glob.escape(_prefix(destination))}*"):
        mark, number = folder / _MARK, folder.suffix.removeprefix(".")
        if mark.is_file() and mark.read_text(encoding="utf-8") == socket.gethostname() and number.isdigit():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except PermissionError:  # somebody's, and running
                pass


def _whole(plan: Plan, after: Opened, staging: Path) -> tuple[Opened, Path] | None:
    """The side that another library can run whole: what was written rather than what was read."""
    if after.model_type is not None:
        return after, staging
    if plan.before.model_type is not None and not is_rounded(plan.before, after):
        return plan.before, plan.before.path  # an upcycled model computes what the old one does
    return None


def _tokenizer_of(opened: Opened) -> tuple[dict[str, bytes], str | None]:
    """Its file, and its eos where another file says it: what else that one says is each format's own."""
    files = opened.tokenizer_files
    config = files.pop(JSON_CONFIG, None)
    return files, None if config is None else names_in(config, opened.path).get("eos")
