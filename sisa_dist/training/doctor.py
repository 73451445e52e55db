"""`sisa doctor`: what this machine has, and whether the parts a run stands on work here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table

from sisa_dist import __version__
from sisa_dist.config import ParallelConfig, UserError
from sisa_dist.ops import sisa_attention
from sisa_dist.parallel.mesh import AXES, init_mesh

_OPTIONAL = {"flash-attn": "flash_attn", "megablocks": "megablocks", "deepspeed": "deepspeed", "wandb": "wandb"}


def diagnose() -> bool:
    """Print one table, on the first rank of a launch; True where every check passed. Absent extras are no failure."""
    table = Table("check", "", "what was found", title=f"sisa {__version__}", title_justify="left")
    passed = True
    for name, check in _CHECKS.items():
        try:
            table.add_row(name, "[green]ok[/]", check())
        except (UserError, AssertionError, OSError, RuntimeError, ValueError) as error:
            passed = False
            table.add_row(name, "[red]failed[/]", " ".join(str(error).split()) or type(error).__name__)
    for package, module in _OPTIONAL.items():
        if importlib.util.find_spec(module):
            table.add_row(package, "[green]ok[/]", importlib.metadata.version(package))
        else:
            table.add_row(package, "-", "not installed (optional)")
    if int(os.environ.get("RANK", "0")) == 0:
        Console(highlight=False).print(table)
    return passed


def _versions() -> str:
    names = ("torch", "numpy", "webdataset", "sentencepiece", "pydantic")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Python {platform.python_version()}, {found}"


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"no GPU: CPU with {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})"


def _score_path() -> str:
    worst = 0.0
    for length, decay in ((65, 0.05), (300, 1.5)):
        generator = torch.Generator().manual_seed(length)

        def rand(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.rand(*shape, generator=generator) - 0.5

        tensors = [rand(1, 2, length, width) for width in (64, 64, 64, 32, 32)]
        tensors += [(rand(1, 2, length) - 0.5) * decay, rand(1, 2, length, 16), torch.full((2,), 0.3)]
        oracle = sisa_attention(*(t.double() for t in tensors), path="dense")
        worst = max(worst, float((sisa_attention(*tensors) - oracle).abs().max()))
    assert worst < 1e-5, (
        f"the score path is {worst:.1e} off its fp64 oracle: please report this with the versions above"
    )
    return f"auto equals the fp64 oracle within {worst:.0e}"


def _process_group() -> str:
    mesh = init_mesh(ParallelConfig())
    total = mesh.sum_over(torch.ones(1, device=mesh.device), *AXES).item()
    assert total == mesh.world_size, f"a sum of ones over {mesh.world_size} ranks gave {total}"
    return f"{mesh.world_size} process(es) on {mesh.device.type}"


def _checkpoint() -> str:
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"x": torch.arange(8.0)}, checkpoint_id=Path(folder) / "c", no_dist=True)
        back = {"x": torch.zeros(8)}
        dcp.load(back, checkpoint_id=Path(folder) / "c", no_dist=True)
        assert torch.equal(back["x"], torch.arange(8.0)), "a tensor came back changed"
    return f"written and read back; {shutil.disk_usage('.').free / 1e9:.0f} GB free here"


_CHECKS: dict[str, Callable[[], str]] = {
    "versions": _versions,
    "device": _device,
    "score path": _score_path,
    "process group": _process_group,
    "checkpoint": _checkpoint,
}
