"""A SLURM of one node, from Debian's slurm-wlm and munge: its daemons run as root, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIG = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
PATH = f"{os.environ['PATH']}:/usr/sbin"


def why_not() -> str | None:
    """Why this machine cannot play a SLURM cluster, or None."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"needs {missing[0]} (Debian: slurm-wlm, munge)"
    return "needs two cores" if (os.cpu_count() or 1) < 2 else None


@contextlib.contextmanager
def one_node(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch, srun and scontrol reach it."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        ports = (first.getsockname()[1], second.getsockname()[1])
    config = folder / "slurm.conf"
    cores = os.cpu_count()
    made = CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports, cores=cores)
    config.write_text(made, encoding="utf-8")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = {"PATH": PATH, "SLURM_CONF": str(config), "OMP_NUM_THREADS": "1"}
    munged = ["--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}={folder}/munged.{name[:3]}" for name in ("pid-file", "log-file", "seed-file")]
    try:
        for command in (["munged", *munged], ["slurmctld"], ["slurmd"]):
            # Their output stays open as long as they run: to a file.
            with (folder / "start.log").open("a") as log:
                subprocess.run(command, env=environment, check=True, stdout=log, stderr=log)
        said = until(lambda: _say(["sinfo", "--noheader", "--format=%T"], environment) == "idle", 30)
        assert said, f"slurmctld: {(folder / 'slurmctld.log').read_text(encoding='utf-8')}"
        yield environment
    finally:
        _say(["scancel", "--user=root"], environment)
        until(lambda: not _say(["squeue", "--noheader"], environment), 60)  # else a step is left that waits for it
        for name in ("slurmd", "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text(encoding="utf-8")), signal.SIGTERM)


def until(reached: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := reached()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return done


def _say(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True).stdout.strip()
