"""A sweep's missing runs as one SLURM array script: tools/slurm_train.sbatch, with a task of the array for each run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sweep_grid import Machine
from sweep_job import ROOT
from sweep_rules import SweepRun

from sisa_dist.config import UserError, replace_file

_TEMPLATE = ROOT / "tools" / "slurm_train.sbatch"
_TRAINS, _FOLDER = './launch.sh train "$@" &', 'cd "$SLURM_SUBMIT_DIR" || exit 2'


def write_script(sweep: Path, runs: Sequence[SweepRun], machine: Machine, *, name: str, at_once: int | None) -> Path:
    """Returns SWEEP/sweep.sbatch. The runs are named in it, since sbatch keeps a copy: a later script moves no task.

    `at_once`: at most so many of them at a time. Both folders have to be at one path on all nodes.
    """
    if not runs:
        raise UserError("nothing is missing: there is no script to write")
    folder = sweep.resolve()
    nodes = max(1, machine.devices // machine.devices_per_node)
    here = min(machine.devices, machine.devices_per_node)
    directives = {
        "job-name": f"sweep-{name}",
        "array": f"1-{len(runs)}" + (f"%{at_once}" if at_once else ""),
        "nodes": str(nodes),
        "gpus-per-node": str(here),
        "ntasks-per-node": str(here),
        "output": f"{folder}/logs/%x-%A_%a.out",
    }
    job = [sys.executable, str(ROOT / "tools" / "sweep_job.py"), str(folder)]
    body = f'{shlex.join(job)} "${{runs[SLURM_ARRAY_TASK_ID - 1]}}" --launch &'
    first = f"runs=({' '.join(shlex.quote(run.name) for run in runs)})\ncd {shlex.quote(str(ROOT))} || exit 2"
    text = _TEMPLATE.read_text(encoding="utf-8")
    assert text.count(_TRAINS) == text.count(_FOLDER) == 1, f"{_TEMPLATE} is not as it is read here"
    kept = [
        line
        for line in text.replace(_TRAINS, body).replace(_FOLDER, first).splitlines()
        if not line.startswith(tuple(f"#SBATCH --{key}=" for key in directives))
    ]
    at = next(number for number, line in enumerate(kept) if line.startswith("#SBATCH"))
    head = [
        "#!/bin/bash\n# The runs named below, one a task of the array, written by tools/run_sweep.py:",
        f"#   sbatch {folder / 'sweep.sbatch'}",
        "# Time limit, partition and account: sbatch's own options, before the script's name. A task that is asked to",
        "# stop saves and goes back into the queue, as under tools/slurm_train.sbatch.",
    ]
    lines = [*head, *(f"#SBATCH --{key}={value}" for key, value in directives.items()), *kept[at:]]
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    replace_file(folder / "sweep.sbatch", "\n".join(lines) + "\n")
    return folder / "sweep.sbatch"
