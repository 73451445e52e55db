"""What packed documents cost: the `documents` command of tools/benchmark.py.

Forward and backward over windows of packed documents (doc_ids given), in time and in peak memory, against
  unpacked  the same tokens with no doc_ids: one document a window, which is the least the same shapes can cost
  apart     each document in a call of its own: the least arithmetic, in as many calls as there are documents
for documents of several lengths: first of a whole model of --layers layers, then of the score alone. Peak memory is
counted by sisa_dist's meter: live bytes of tensors, inputs left out; what a kernel of PyTorch's takes inside one call
it does not see.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model import LM, build_model
from sisa_dist.ops import causal_attention, sisa_attention
from sisa_dist.training.memory_meter import MemoryMeter

HEADS, D_H, D_S, VOCAB = 4, 64, 32, 4096
KINDS = ("one document", "mean 512", "mean 64", "log-normal")
Run = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)


def document_lengths(kind: str, total: int, seed: int) -> list[int]:
    """Of one window: `one` document, exponential with a mean of 512 or 64, or log-normal as web text is (median 300,
    σ 1.2: mean 600). What does not fit is cut off."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        if kind == "one document":
            drawn = float(total)
        elif kind == "log-normal":
            drawn = rng.lognormal(np.log(300), 1.2)
        else:
            drawn = rng.exponential(int(kind.removeprefix("mean ")))
        lengths.append(min(left, max(1, int(drawn))))
    return lengths


def measure(arguments: argparse.Namespace, in_turns: Callable[[dict[str, Run], int], dict[str, float]]) -> dict:
    windows, length = arguments.windows, arguments.length
    shape = f"B {windows}, T {length}, H {HEADS}, d_h {D_H}, d_s {D_S}, fp32; model of {arguments.layers} layers"
    figures: dict[str, Any] = {"shape": shape}
    for name in ("sisa bisected", "sisa single", "attention"):
        model = _model(name, arguments.layers)
        tokens = torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(0))
        tokens = tokens.to(model.embed.weight.device)
        figures[f"model, {name}"] = _compare(
            arguments, in_turns, list(model.parameters()), functools.partial(_run_model, model, tokens), None
        )
        tensors = _inputs(name, windows, length)
        figures[f"score, {name}"] = _compare(
            arguments,
            in_turns,
            tensors,
            functools.partial(_run, name, tensors),
            functools.partial(_run_apart, name, tensors),
        )
    return figures


def _compare(
    arguments: argparse.Namespace,
    in_turns: Callable[[dict[str, Run], int], dict[str, float]],
    inputs: list[torch.Tensor],
    run: Callable[[torch.Tensor | None], Run],
    run_apart: Callable[[list[list[int]]], Run] | None,
) -> dict[str, Any]:
    runs: dict[str, Run] = {"unpacked": run(None)}
    for kind in KINDS:
        rows = [document_lengths(kind, arguments.length, seed) for seed in range(arguments.windows)]
        ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
        runs[kind] = run(torch.stack(ids).to(inputs[0].device))
        if run_apart is not None:
            runs[f"{kind}, apart"] = run_apart(rows)
    seconds = in_turns(runs, arguments.rounds)
    peaks = {name: _peak(runs[name], inputs) for name in ("unpacked", *KINDS)}
    found: dict[str, Any] = {
        "unpacked": {"seconds": round(seconds["unpacked"], 4), "peak MB": round(peaks["unpacked"] / 1e6, 1)}
    }
    for kind in KINDS:
        found[kind] = {
            "time / unpacked": round(seconds[kind] / seconds["unpacked"], 3),
            "memory / unpacked": round(peaks[kind] / peaks["unpacked"], 3),
        }
        if run_apart is not None:
            found[kind]["time / apart"] = round(seconds[kind] / seconds[f"{kind}, apart"], 3)
    return found


def _model(name: str, layers: int) -> LM:
    width, path = HEADS * D_H, name.removeprefix("sisa ") if name != "attention" else "auto"
    sizes = dict(vocab_size=VOCAB, d_model=width, n_layers=layers, n_heads=HEADS, d_ff=4 * width)
    mixer = dict(mixer="attention") if name == "attention" else dict(mixer="sisa", d_s=D_S)
    model = build_model(ModelConfig(**sizes, **mixer), attention=AttentionConfig(path=path))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _run_model(model: LM, tokens: torch.Tensor, doc_ids: torch.Tensor | None) -> Run:
    def once() -> None:
        loss, _ = model(tokens, tokens, doc_ids_BT=doc_ids)
        torch.autograd.grad(loss, list(model.parameters()))
        if tokens.is_cuda:
            torch.cuda.synchronize()

    return once


def _inputs(name: str, windows: int, length: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    tensors = [rand(windows, HEADS, length, D_H) for _ in range(3)]
    if name != "attention":
        tensors += [rand(windows, HEADS, length, D_S) for _ in range(2)]
        # Weak decay, so that the one call is right too and does the same work.
        tensors += [-1e-3 * rand(windows, HEADS, length).abs(), rand(windows, HEADS, length, D_S // 2)]
        tensors += [rand(HEADS).exp()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [tensor.to(device).requires_grad_() for tensor in tensors]


def _score(name: str, inputs: list[torch.Tensor], doc_ids: torch.Tensor | None) -> torch.Tensor:
    if name == "attention":
        return causal_attention(*inputs, doc_ids=doc_ids)
    return sisa_attention(*inputs, doc_ids=doc_ids, path=name.removeprefix("sisa "))


def _run(name: str, tensors: list[torch.Tensor], doc_ids: torch.Tensor | None) -> Run:
    def once() -> None:
        torch.autograd.grad(_score(name, tensors, doc_ids).sum(), tensors)
        if tensors[0].is_cuda:
            torch.cuda.synchronize()

    return once


def _run_apart(name: str, tensors: list[torch.Tensor], rows: list[list[int]]) -> Run:
    def once() -> None:
        for number, row in enumerate(rows):
            start = 0
            for length in row:
                cut = slice(number, number + 1), slice(None), slice(start, start + length)
                own = [(x if x.ndim == 1 else x[cut]).detach().requires_grad_() for x in tensors]  # λ is for all
                torch.autograd.grad(_score(name, own, None).sum(), own)
                start += length
        if tensors[0].is_cuda:
            torch.cuda.synchronize()

    return once


def _peak(run: Run, tensors: list[torch.Tensor]) -> int:
    """Bytes, the most of forward and backward, of all that is not an input."""
    with MemoryMeter() as meter:
        meter.mark(tensors, "states")
        run()
    return meter.peaks[""]["rest"]
