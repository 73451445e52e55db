"""How near `sisa prepare` comes to the tokenizer library's own speed: python tools/benchmark_prepare.py [--megabytes N]

Writes a .jsonl of Python's sources over and over (each copy of a file begins with another line, so that no two
documents are the same), trains a tokenizer, and then measures in turns, several rounds, on the same texts:
  library   SentencePiece's encode of the texts in one process, one thread, nothing else: bytes a second
  prepare   the whole of `sisa prepare` with `data.workers`: reading, parsing, encoding, shuffling, writing shards
`ratio` is prepare / (workers × library) by the clock, and `ratio, CPU` the same per second of CPU, which other
processes on the machine disturb less. On a busy machine quote both and say so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import sentencepiece

from data_pipeline.prepare import prepare
from data_pipeline.sources import Corpus
from data_pipeline.tokenizer import train_tokenizer
from sisa_dist.config import RunConfig, parse_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the corpus and the shards go; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(_measure(Path(folder), arguments), indent=1))


def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    texts = [document.text for document in Corpus("python-stdlib")]
    train_tokenizer(texts, folder / "tokenizer.model", vocab_size=arguments.vocab_size, sample_bytes=8_000_000)
    size = copy = 0
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        while size < arguments.megabytes * 1_000_000:
            for text in texts:
                line = f"# copy {copy}\n{text}"
                file.write(json.dumps({"text": line}, ensure_ascii=False) + "\n")
                size += len(line.encode())
            copy += 1
    sample = texts[:: max(1, len(texts) // 150)]
    rounds: dict[str, list[float]] = {"library": [], "library, CPU": [], "prepare": [], "prepare, CPU": []}
    for number in range(arguments.rounds):
        # In a process of its own: this one has read the corpus and holds threads.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            wall, cpu = pool.apply(_library, (str(folder / "tokenizer.model"), sample))
        rounds["library"].append(wall)
        rounds["library, CPU"].append(cpu)
        before, started = os.times(), time.perf_counter()
        made = prepare(_config(folder, f"data{number}", arguments), quiet=True)
        seconds, after = time.perf_counter() - started, os.times()
        counts = json.loads((made / "prepared.json").read_text(encoding="utf-8"))["counts"]
        assert sum(split["bytes"] for split in counts.values()) == size
        rounds["prepare"].append(size / seconds)
        rounds["prepare, CPU"].append(size / sum(b - a for a, b in zip(before[:4], after[:4], strict=True)))
    middle = {name: statistics.median(values) for name, values in rounds.items()}
    return {
        "workers": arguments.workers,
        "text, MB": round(size / 1e6),
        "load average": os.getloadavg()[0],
        **{f"{name}, MB/s": round(value / 1e6, 2) for name, value in middle.items()},
        "ratio": round(middle["prepare"] / (arguments.workers * middle["library"]), 3),
        "ratio, CPU": round(middle["prepare, CPU"] / middle["library, CPU"], 3),
    }


def _library(model: str, texts: list[str]) -> tuple[float, float]:
    """Bytes a second by the clock and of CPU, the better of one call a text and one call for all."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    size = sum(len(text.encode()) for text in texts)
    best_wall = best_cpu = 0.0
    for _ in range(3):
        for run in (
            lambda: [tokenizer.encode(text, out_type=int) for text in texts],
            lambda: tokenizer.encode(texts, out_type=int, num_threads=1),
        ):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            best_wall = max(best_wall, size / (time.perf_counter() - wall))
            best_cpu = max(best_cpu, size / (time.process_time() - cpu))
    return best_wall, best_cpu


def _config(folder: Path, name: str, arguments: argparse.Namespace) -> RunConfig:
    tree = {
        "model": {
            "vocab_size": arguments.vocab_size,
            "d_model": 16,
            "n_layers": 1,
            "n_heads": 2,
            "d_ff": 32,
            "d_s": 2,
        },
        "schedule": {"warmup_steps": 0},
        "training": {"steps": 1, "seq_len": 16, "global_batch_tokens": 64},
        "data": {
            "input": str(folder / "corpus.jsonl"),
            "folder": str(folder / name),
            "tokenizer": {"path": str(folder / "tokenizer.model")},
            "workers": arguments.workers,
        },
    }
    return parse_config(tree, source="benchmark")


if __name__ == "__main__":
    main()
