"""A conversion holds about one tensor, whatever the model: by live tensor bytes, and by the memory of a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sisa_dist.convert.conversion import convert, plan
from sisa_dist.convert.tensors import num_bytes

ROOT = Path(__file__).parents[2]
WIDE: dict[str, Any] = {"mixer": "sisa", "d_s": 8, "d_model": 256, "d_ff": 1024}


SLOW = [(("hf", "native"), 8), (("native",), 3)]


@pytest.mark.parametrize(
    ("route", "n_layers"),  # enough of them that half of what is written is much more than one tensor
    [(("safetensors", "native"), 3), *(pytest.param(*values, marks=pytest.mark.slow) for values in SLOW)],
)
def test_live_tensors_are_about_one(
    make_checkpoint: Callable[..., Any],
    tmp_path: Path,
    toy: ModuleType,
    real_memory: Any,
    route: tuple[str, ...],
    n_layers: int,
) -> None:
    path = make_checkpoint(**WIDE, n_layers=n_layers, moments="hf" not in route).folder
    for number, to in enumerate(route):
        planned = plan(path, to=to, moments=None if to == "hf" else planned_moments(path))
        path = tmp_path / f"out{number}.safetensors"
        with real_memory() as meter:
            list(convert(planned, path, how="blocks"))
        sizes = [num_bytes(spec) for spec in planned.made.specs.values()]
        # A tensor, the stored part or the copy it is made through, the activations of 192 tokens.
        assert sum(meter.peaks[""].values()) < 3 * max(sizes) + 6_000_000 < planned.bytes / 2


def planned_moments(path: Path) -> bool:
    from sisa_dist.convert.formats import open_checkpoint

    return open_checkpoint(path).has_moments


MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from sisa_dist.convert.conversion import convert, plan

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peak, stop = 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())

small, big, small_out, out, to = sys.argv[1:]
moments = True if to != "hf" else None
list(convert(plan(Path(small), to=to, moments=moments), Path(small_out), how="blocks"))  # imports, thread pools
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
planned = plan(Path(big), to=to, moments=moments)
list(convert(planned, Path(out), how="blocks"))
stop.set()
thread.join()
print(json.dumps({"growth": peak - before, "bytes": planned.bytes}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: the system does not say")
def test_a_process_grows_by_little(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """A checkpoint of 320 MB, moments among them, whose largest tensor is 8 MB: to one file and back."""
    small = make_checkpoint("small").folder
    sizes = {"d_model": 1024, "n_heads": 16, "d_ff": 2048, "n_layers": 3, "mixer": "sisa", "d_s": 8}
    big = make_checkpoint("big", **sizes).folder
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    for number, to in enumerate(("safetensors", "native")):
        outs = [tmp_path / f"{size}{number}.safetensors" for size in ("small", "big")]
        done = subprocess.run(
            [sys.executable, script, small, big, *outs, to],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout.splitlines()[-1])
        print(to, figures)
        # 37 to 60 MB were measured: four copies of a tensor as it is unpacked, and what malloc keeps of freed ones,
        # which does not grow with the model.
        assert figures["bytes"] > 300_000_000 and figures["growth"] < figures["bytes"] / 4
        small, big = outs
