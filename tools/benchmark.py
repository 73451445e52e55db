"""Measured ratios, each of things timed in turns in one run, so that a noisy machine disturbs both alike.

    python tools/benchmark.py step  [--seq-len 512 2048]     SISA, our Transformer and transformers' Llama, tokens/s
    python tools/benchmark.py score [--lengths 4096 8192]    bisected ÷ the one (padded) call, forward + backward
    python tools/benchmark.py start                          from `import` to the first optimizer step, in a new process
    torchrun --nproc-per-node 2 tools/benchmark.py overlap   tp 2, collectives hidden behind matmuls ÷ not
    python tools/benchmark.py save [--set K=V] [--folder F]  what a save takes, and what of it training waits for
    python tools/benchmark.py documents [--length 2048]      packed ÷ unpacked, time and memory (benchmark_documents.py)
    python tools/benchmark.py loader CONFIG                  the loader alone, tokens/s, on prepared data
    python tools/benchmark.py data                           it and others' loaders on the same tokens

A tool, never a timed test: it asserts nothing. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_data
import benchmark_documents
import torch

from data_pipeline.loader import Batch
from sisa_dist.checkpoint import Saved, Saver, TrainState
from sisa_dist.config import ModelConfig, RunConfig, load_config
from sisa_dist.engine import build_engine
from sisa_dist.model import build_model, num_parameters
from sisa_dist.ops import sisa_attention
from sisa_dist.parallel.mesh import init_mesh

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step")
    step.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    step.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    step.add_argument("--rounds", type=int, default=9)
    step.add_argument("--profile", action="store_true", help="print where a SISA step spends its time")
    score = commands.add_parser("score")
    score.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    score.add_argument("--rounds", type=int, default=7)
    commands.add_parser("start")
    overlap = commands.add_parser("overlap", help="under torchrun: tp over all processes, overlapped ÷ synchronous")
    overlap.add_argument("--rounds", type=int, default=15)
    overlap.add_argument("--set", dest="overrides", action="append", default=[])
    save = commands.add_parser("save", help="also under torchrun")
    save.add_argument("--rounds", type=int, default=3)
    save.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    save.add_argument("--set", dest="overrides", action="append", default=[])
    benchmark_documents.add_arguments(commands.add_parser("documents"))
    loader = commands.add_parser("loader")
    loader.add_argument("config", type=Path)
    loader.add_argument("--set", dest="overrides", action="append", default=[])
    benchmark_data.add_parser(commands)
    arguments = parser.parse_args(argv)
    command = {
        "step": _step,
        "score": _score,
        "start": _start,
        "overlap": _overlap,
        "save": _save,
        "documents": lambda arguments: benchmark_documents.measure(arguments, _in_turns),
        "loader": _loader,
        "data": benchmark_data.data,
    }
    figures = command[arguments.command](arguments)
    if int(os.environ.get("RANK", "0")):
        return 0
    figures["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return 0


def equal_transformer(config: RunConfig) -> RunConfig:
    """`config` with attention mixers and d_ff widened to pay for what the SSM channels cost."""
    model = config.model.model_dump() | {"mixer": "attention", "d_s": None, "log_alpha_min": None}

    def size(d_ff: int) -> int:
        with torch.device("meta"):
            return num_parameters(build_model(ModelConfig(**(model | {"d_ff": d_ff}))))

    with torch.device("meta"):
        wanted = num_parameters(build_model(config.model))
    a_column = size(config.model.d_ff + 1) - size(config.model.d_ff)
    model["d_ff"] = config.model.d_ff + round((wanted - size(config.model.d_ff)) / a_column)
    return config.model_copy(update={"model": ModelConfig(**model)})


def _step(arguments: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    base = load_config(arguments.config)
    tokens_per_step = base.training.seq_len * base.training.micro_batch_size
    for seq_len in arguments.seq_len:
        rows = max(1, tokens_per_step // seq_len)
        batch = _batch(base.model.vocab_size, rows, seq_len)
        transformer = equal_transformer(base)
        runs = {"sisa": _ours(base, batch), "transformer": _ours(transformer, batch)}
        runs["llama"] = _llama(transformer, batch)
        seconds = _in_turns(runs, arguments.rounds)
        rate = {name: rows * seq_len / value for name, value in seconds.items()}
        figures[f"seq_len {seq_len}"] = {
            "batch": rows,
            "tokens_per_second": {name: round(value) for name, value in rate.items()},
            "sisa / transformer (promised ≥ 0.8)": round(rate["sisa"] / rate["transformer"], 3),
            "transformer / llama (promised ≥ 1.0)": round(rate["transformer"] / rate["llama"], 3),
        }
        if arguments.profile:
            _print_profile(runs["sisa"])
    return figures


def _ours(config: RunConfig, batch: Batch) -> Callable[[], None]:
    engine = build_engine(config, init_mesh(config.parallel, device=config.device))
    return lambda: engine.train_step([batch], 1e-3) and None  # type: ignore[func-returns-value]


def _llama(config: RunConfig, batch: Batch) -> Callable[[], None]:
    """transformers' Llama of the same sizes in a plain PyTorch loop: same tokens, optimizer and clipping."""
    from transformers import LlamaConfig, LlamaForCausalLM

    m, o = config.model, config.optimizer
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=m.padded_vocab_size,
            hidden_size=m.d_model,
            intermediate_size=m.d_ff,
            num_hidden_layers=m.n_layers,
            num_attention_heads=m.n_heads,
            num_key_value_heads=m.kv_heads,
            tie_word_embeddings=m.tie_embeddings,
            max_position_embeddings=batch.tokens.shape[1],
        )
    ).to(init_mesh(config.parallel, device=config.device).device)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=o.lr, betas=tuple(o.betas), weight_decay=0.1, fused=True)
    tokens, labels = batch.tokens.to(llama.device), batch.labels.to(llama.device)

    def step() -> None:
        logits = llama(tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _score(arguments: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {"shape": "B 1, H 4, d_h 64, d_s 32, fp32"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for length in arguments.lengths:

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device)

        tensors = [rand(1, 4, length, d) for d in (64, 64, 64, 32, 32)]
        # Weak decay, so that the one call is right too and does the same work.
        tensors += [-torch.rand(1, 4, length, device=device) * 1e-3, rand(1, 4, length, 16), rand(4).exp()]
        for tensor in tensors:
            tensor.requires_grad_()

        def run(path: str, inputs: list[torch.Tensor] = tensors) -> Callable[[], None]:
            def once() -> None:
                sisa_attention(*inputs, path=path).sum().backward()
                if device == "cuda":
                    torch.cuda.synchronize()

            return once

        seconds = _in_turns({"bisected": run("bisected"), "single": run("single")}, arguments.rounds)
        figures[f"T {length}"] = {name: round(value, 4) for name, value in seconds.items()}
        figures[f"T {length}"]["bisected / single (promised ≤ 1.25)"] = round(
            seconds["bisected"] / seconds["single"], 3
        )
    return figures


def _start(arguments: argparse.Namespace) -> dict[str, Any]:
    code = (
        "import torch\n"
        "from data_pipeline.loader import Batch\n"
        "from sisa_dist.config import load_config\n"
        "from sisa_dist.engine import build_engine\n"
        "from sisa_dist.parallel.mesh import init_mesh\n"
        f"c = load_config({str(ROOT / 'configs' / 'quickstart.yaml')!r})\n"
        "t = torch.zeros(c.training.micro_batch_size, c.training.seq_len, dtype=torch.int64)\n"
        "build_engine(c, init_mesh(c.parallel)).train_step([Batch(t, t, None)], 1e-3)\n"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return {"import to first step, seconds (promised ≤ 10)": round(time.perf_counter() - started, 2)}


def _overlap(arguments: argparse.Namespace) -> dict[str, Any]:
    tp = int(os.environ.get("WORLD_SIZE", "1"))
    runs = {}
    for name, overlap in (("synchronous", False), ("overlapped", True)):
        own = [f"parallel.tp={tp}", f"engine.overlap={str(overlap).lower()}"]
        config = load_config(ROOT / "configs" / "quickstart.yaml", [*arguments.overrides, *own])
        batch = _batch(config.model.vocab_size, config.training.micro_batch_size, config.training.seq_len)
        runs[name] = _ours(config, batch)
    seconds = _in_turns(runs, arguments.rounds)
    figures: dict[str, Any] = {name: round(value, 4) for name, value in seconds.items()}
    return figures | {"overlapped / synchronous": round(seconds["overlapped"] / seconds["synchronous"], 3)}


def _save(arguments: argparse.Namespace) -> dict[str, Any]:
    config = load_config(ROOT / "configs" / "quickstart.yaml", arguments.overrides)
    mesh = init_mesh(config.parallel, device=config.device)
    engine = build_engine(config, mesh)
    batch = _batch(config.model.vocab_size, config.training.micro_batch_size, config.training.seq_len)
    state, alone, beside = TrainState(0, 0, 0, 0.0, ""), [], []

    def step() -> float:
        started = time.perf_counter()
        engine.train_step([batch], 1e-4)
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saver = Saver(Path(folder), engine, config=config, files={}, mesh=mesh)
        saves: list[Saved] = []
        for number in range(arguments.rounds + 1):  # the first makes the buffers and does not count
            alone += [step() for _ in range(3)]
            saver.save(replace(state, step=number))
            beside += [step() for _ in range(3)]
            saver.finish()
            saves += saver.collect()
        mesh.barrier()
    seconds, blocked = (statistics.median(getattr(s, name) for s in saves[1:]) for name in ("seconds", "blocked"))
    return {
        "bytes of a rank": saves[0].bytes,
        "save, s": round(seconds, 3),
        "GB/s of a rank, hashed and synced": round(saves[0].bytes / seconds / 1e9, 3),
        "blocked / save": round(blocked / seconds, 4),
        "step beside a save / step": round(statistics.median(beside[3:]) / statistics.median(alone[3:]), 3),
    }


def _loader(arguments: argparse.Namespace) -> dict[str, Any]:
    from data_pipeline.loader import Loader
    from sisa_dist.training.run_data import open_data

    config = load_config(arguments.config, arguments.overrides)
    loader = Loader(
        open_data(config).train,
        seq_len=config.training.seq_len,
        seed=config.seed,
        global_batch_windows=config.training.global_batch_windows,
        micro_batch_size=config.training.micro_batch_size,
        lanes=config.data.lanes,
    )
    with loader.steps(0) as batches:
        next(batches)
        started, tokens = time.perf_counter(), 0
        while time.perf_counter() - started < 5:
            tokens += next(batches).num_targets
    return {"loader tokens/s": round(tokens / (time.perf_counter() - started))}


def _batch(vocab: int, rows: int, seq_len: int) -> Batch:
    window = torch.randint(0, vocab, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous(), None)


def _in_turns(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round; the first two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def _print_profile(run: Callable[[], None]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


if __name__ == "__main__":
    raise SystemExit(main())
