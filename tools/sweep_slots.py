"""The places where runs of a sweep train, and what of its machine each may use: shares of devices and of cores."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from sisa_dist.config import UserError

_JOB = Path(__file__).resolve().with_name("sweep_job.py")
_PATIENCE = 120.0  # seconds for a host to import torch and answer
# What local_slots reads, on a host: devices that PyTorch sees, their names where somebody chose them, cores.
_ASK = "import json, os, torch as t; print(json.dumps([t.cuda.device_count(), os.getenv('CUDA_VISIBLE_DEVICES'), "
_ASK += "os.cpu_count()]))"


@dataclass(frozen=True)
class Slot:
    """A place where one run at a time trains."""

    host: str | None = None  # None: here
    devices: str | None = None  # CUDA_VISIBLE_DEVICES; None: there are none
    processes: int = 1
    threads: int = 1  # of a process, unless OMP_NUM_THREADS says otherwise there

    def command(self, sweep: Path, name: str, *, launch: bool) -> list[str]:
        job = [sys.executable, str(_JOB), str(sweep.resolve()), name, "--until-eof"] + (["--launch"] if launch else [])
        if self.host is None:
            return job
        told = [f"{key}={shlex.quote(value)}" for key, value in self._told().items()]
        script = f"exec env OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{self.threads}}} {' '.join(told)} {shlex.join(job)}"
        return _ssh(self.host, ["sh", "-c", script])

    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads)} | dict(os.environ) | self._told()

    def _told(self) -> dict[str, str]:
        devices = {} if self.devices is None else {"CUDA_VISIBLE_DEVICES": self.devices}
        return {"NPROC": str(self.processes)} | devices  # which launch.sh starts


def local_slots(at_once: int, devices: int) -> list[Slot]:
    """`devices` of each run, of those that CUDA_VISIBLE_DEVICES leaves. Raises UserError where they are too few."""
    found = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.cpu_count()
    return _shares(None, *found, at_once=at_once, devices=devices)


def host_slots(hosts: Sequence[str], at_once: int, devices: int, console: Console) -> list[Slot]:
    """As `local_slots` on each host, in turns. Hosts that do not answer are left out and named.

    Raises UserError where a host has not so many devices, or none answers.
    """
    asked = [sys.executable, "-c", _ASK]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    asking = {host: subprocess.Popen(_ssh(host, asked), text=True, **streams) for host in dict.fromkeys(hosts)}
    found = []
    for host, process in asking.items():
        try:
            answer, said = process.communicate(timeout=_PATIENCE)
            count, named, cores = json.loads((answer.splitlines() or [""])[-1])  # after what its shell may greet with
        except (subprocess.TimeoutExpired, ValueError, TypeError) as error:
            process.kill()
            process.wait()
            said = f"no answer in {_PATIENCE:.0f} s" if isinstance(error, subprocess.TimeoutExpired) else said.strip()
            console.print(f"{host}: {said.splitlines()[-1] if said else 'ssh failed'}: left out", markup=False)
            continue
        found.append(_shares(host, count, named, cores, at_once=at_once, devices=devices))
    if not found:
        raise UserError("--hosts: none of them can be used, see above: each needs ssh without a password and .venv/")
    return [slot for turn in zip(*found, strict=True) for slot in turn]


def _shares(
    host: str | None, count: int, named: str | None, cores: int | None, *, at_once: int, devices: int
) -> list[Slot]:
    threads = max(1, (cores or 1) // (at_once * devices))
    if not count:
        return [Slot(host, None, devices, threads)] * at_once
    if at_once * devices > count:
        raise UserError(
            f"{at_once} run(s) at a time of {devices} device(s) each, and there are {count} "
            f"{f'on {host}' if host else 'here'}: lower --jobs or machine.devices"
        )
    names = named.split(",") if named else [str(number) for number in range(count)]
    shares = [names[first : first + devices] for first in range(0, at_once * devices, devices)]
    return [Slot(host, ",".join(share), devices, threads) for share in shares]


def _ssh(host: str, command: Sequence[str]) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", host, f"exec {shlex.join(command)}"]
