"""What devices can do at most: the ceilings that the roofline divides by, and MFU too.

Rows are the vendors' data sheets, dense figures without structured sparsity. fp32 is what PyTorch does by default,
which is to multiply in fp32 on the vector units: TF32 is off unless a program turns it on, and ours does not. A host
has eight of them and a network card for each, as the vendors' own machines. `here` measures this machine instead, in
seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sisa_dist.config import UserError

HERE = "here"


@dataclass(frozen=True)
class Device:
    """One rank's. Bandwidths in bytes a second; those of links in one direction."""

    name: str
    flops: dict[str, float]  # FLOP/s of matmuls by dtype: float32, bfloat16
    bandwidth: float  # of its memory
    memory: float  # bytes that a run may fill
    link: float  # to the other devices of its host
    network: float  # its network card, to other hosts
    host_link: float  # to host memory
    host_bandwidth: float  # a rank's part of what host memory gives
    ranks_per_host: int = 8
    overlaps: bool = True  # whether it computes while it sends
    is_host: bool = False  # its memory is host memory: nothing is saved by moving there
    chip: str = ""  # what PyTorch's name of such a device holds
    measured: str = ""  # of what was measured, and what was not


def _gpu(name: str, chip: str, fp32: float, bf16: float, memory: float, bandwidth: float, **links: float) -> Device:
    """In TFLOP/s, GB and GB/s as data sheets have them. Of the memory a driver shows some per cent more than these
    decimal GB: they are what the CUDA context and NCCL take."""
    return Device(
        name,
        {"float32": fp32 * 1e12, "bfloat16": bf16 * 1e12},
        bandwidth * 1e9,
        memory * 1e9,
        link=links["link"] * 1e9,
        network=links["network"] * 1e9,
        host_link=links["host_link"] * 1e9,
        host_bandwidth=links["host_bandwidth"] * 1e9,
        chip=chip,
    )


_A100 = dict(
    link=300,  # NVLink 3: 600 GB/s both ways
    network=25,  # DGX A100: eight ConnectX-6 of 200 Gb/s
    host_link=32,  # PCIe 4 x16: 64 GB/s both ways
    host_bandwidth=51,  # DGX A100: two EPYC 7742 with eight channels of DDR4-3200 each, for eight GPUs
)
_HOPPER = dict(
    link=450,  # NVLink 4: 900 GB/s both ways
    network=50,  # DGX H100 and H200: eight ConnectX-7 of 400 Gb/s
    host_link=64,  # PCIe 5 x16: 128 GB/s both ways
    host_bandwidth=77,  # DGX H100: two Xeon 8480C with eight channels of DDR5-4800 each, for eight GPUs
)
_B200 = dict(
    link=900,  # NVLink 5: 1.8 TB/s both ways
    network=50,  # DGX B200: eight ConnectX-7 of 400 Gb/s
    host_link=64,  # PCIe 5 x16, as DGX B200 has them
    host_bandwidth=90,  # DGX B200: two Xeon 8570 with eight channels of DDR5-5600 each, for eight GPUs
)

_ROWS = (
    # NVIDIA A100 data sheet (2021), SXM: 19.5 TFLOP/s fp32, 312 bf16; 40 GB HBM2 at 1555 GB/s, 80 GB HBM2e at 2039
    _gpu("a100-40gb", "A100", 19.5, 312, 40, 1555, **_A100),
    _gpu("a100-80gb", "A100", 19.5, 312, 80, 2039, **_A100),
    # NVIDIA H100 data sheet (2023), SXM: 67 TFLOP/s fp32, 989 bf16 (1979 with sparsity); 80 GB HBM3 at 3.35 TB/s
    _gpu("h100", "H100", 67, 989, 80, 3350, **_HOPPER),
    # NVIDIA H200 data sheet (2024), SXM: H100's chip; 141 GB HBM3e at 4.8 TB/s
    _gpu("h200", "H200", 67, 989, 141, 4800, **_HOPPER),
    # NVIDIA Blackwell data sheet (2024), HGX B200 at 1000 W: 80 TFLOP/s fp32, 2250 bf16 (4500 with sparsity); 180 GB
    # HBM3e at 8 TB/s, as DGX B200 has it
    _gpu("b200", "B200", 80, 2250, 180, 8000, **_B200),
)
DEVICES = {row.name: row for row in _ROWS}


def device_named(name: str, *, ranks: int = 1) -> Device:
    """Of the table, or this machine's for `here`, which `ranks` processes would share. Raises UserError."""
    if name == HERE:
        return measure_here(ranks)
    if name.lower() not in DEVICES:
        raise UserError(f"--device {name} is not known: set one of {', '.join(DEVICES)}, or {HERE} to measure this one")
    return DEVICES[name.lower()]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU divides by: the data sheet's on a known GPU, else the best of a few large matmuls here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for row in _ROWS:
            if row.chip in name:
                return row.flops[str(dtype).removeprefix("torch.")]
    return _matmul(device, dtype)


def measure_here(ranks: int) -> Device:
    """This machine's first GPU, or its CPU, whose cores and memory `ranks` processes share."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    flops = {name: _matmul(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    size = 2**30 if cuda else 2**28
    block = torch.ones(size // 4, device=device)
    copied = torch.empty_like(block)
    bandwidth = 2 * size / _best(lambda: copied.copy_(block), device)  # read and written
    if not cuda:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        told = f"{torch.get_num_threads()} thread(s): matmuls and a copy were measured"
        if ranks > 1:
            told += f", shared by {ranks} processes; what these send each other is charged as copies"
        return Device(
            HERE,
            {name: rate / ranks for name, rate in flops.items()},
            bandwidth / ranks,
            memory / ranks,
            link=bandwidth / 2 / ranks,
            network=bandwidth / 2 / ranks,
            host_link=bandwidth / 2 / ranks,
            host_bandwidth=bandwidth / ranks,
            ranks_per_host=ranks,
            is_host=True,
            overlaps=False,  # the cores that would send are those that compute
            measured=told,
        )
    pinned = torch.ones(size // 4, pin_memory=True)
    host_link = size / _best(lambda: copied.copy_(pinned, non_blocking=True), device)
    plain = torch.empty(2**28 // 4)
    host = torch.ones_like(plain)
    host_bandwidth = 2 * plain.nbytes / _best(lambda: plain.copy_(host), torch.device("cpu"))
    found, link = torch.cuda.device_count(), bandwidth / 2
    told = f"{torch.cuda.get_device_name(device)}: matmuls and copies were measured"
    if found > 1:
        other = torch.empty_like(block, device="cuda:1")
        link = size / _best(lambda: other.copy_(block), device)
        told += ", between two GPUs too"
    elif ranks > 1:
        told += "; what processes send each other is charged as copies inside one GPU"
    if ranks > found:
        told += "; the network was not, and is charged as the link inside this host"
    return Device(
        HERE,
        flops,
        bandwidth,
        torch.cuda.mem_get_info(device)[1],
        link=link,
        network=link,
        host_link=host_link,
        host_bandwidth=host_bandwidth / found,
        ranks_per_host=found,
        measured=told,
    )


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, dtype=dtype, device=device), torch.randn(n, n, dtype=dtype, device=device)
    return 2 * n**3 / _best(lambda: a @ b, device)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few; the first warms up. A second is enough of one that is slow."""
    best, spent = float("inf"), 0.0
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
        if spent > 1.0:
            break
    return best
