"""launch.sh on two hosts: by torchrun's rendezvous and by deepspeed over ssh and pdsh, to the loss of one process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import QUICKSTART

from data_pipeline.prepare import prepare
from multihost.hosts import Host, two_hosts, why_not
from runs import losses
from sisa_dist.config import load_config
from sisa_dist.training.trainer import train

pytestmark = pytest.mark.multihost
ROOT = Path(__file__).parents[2]
TIMEOUT = 150
# The quickstart's model with a small vocabulary, for a few small steps.
FEW_STEPS = [
    "model.vocab_size=512",
    "data.validation_fraction=0",
    "schedule.warmup_steps=2",
    "training.steps=3",
    "training.seq_len=64",
    "training.micro_batch_size=2",
    "training.global_batch_tokens=256",
    "training.eval_every=null",
    "training.checkpoint_every=null",
]
NAME = 'name=two hosts, 100%n of "it\'s" $HOME; `true` *'  # what a shell on the way would like to read
# What `pip install` puts into .venv/bin, without a second installation.
TOOLS = {"python": "", "sisa": "-m sisa_dist.cli", "torchrun": "-m torch.distributed.run"}
TOOLS |= {"deepspeed": "-m deepspeed.launcher.runner"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    if (reason := why_not()) is not None:
        pytest.skip(f"two hosts on this machine: {reason}")
    with two_hosts(tmp_path_factory.mktemp("hosts") / "etc") as pair:
        yield pair


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a clone whose environment is made, with the data and the losses of one process."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("sisa_dist", "data_pipeline", "configs"):
        (folder / name).symlink_to(ROOT / name)
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, module in TOOLS.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    stamp = "cat pyproject.toml constraints.txt | cksum >.venv/.installed"
    subprocess.run(stamp, shell=True, cwd=folder, check=True)
    for number, source in enumerate(sorted((ROOT / "data_pipeline").glob("*.py"))):
        shutil.copy(source, folder / f"{number}.txt")
    config = load_config(QUICKSTART, overrides(folder, "one"))
    prepare(config, quiet=True)
    train(config, quiet=True)
    return folder


def overrides(clone: Path, run: str) -> list[str]:
    return [*FEW_STEPS, f"data.input={clone}/*.txt", f"data.folder={clone}/data", f"output_dir={clone}/{run}"]


def arguments(clone: Path, run: str, *more: str) -> list[str]:
    return ["./launch.sh", "train", "configs/quickstart.yaml"] + [
        f"--set={override}" for override in (*overrides(clone, run), *more)
    ]


def ended(*started: subprocess.Popen[str]) -> tuple[list[int], str]:
    """Exit codes, and all that was said."""
    deadline, codes, said = time.monotonic() + TIMEOUT, [], ""
    for process in started:
        try:
            said += process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            said += f"{process.communicate()[0]}\n--- killed after {TIMEOUT} s"
        codes.append(process.returncode)
    return codes, said


def assert_like_one_process(clone: Path, run: str) -> None:
    rows = list(zip(losses(clone / "one"), losses(clone / run), strict=True))
    assert len(rows) == 3
    for one, two in rows:
        assert one[0] == two[0] and one[3] == two[3]  # the same samples
        assert abs(one[1] - two[1]) < 1e-5 and abs(one[2] - two[2]) < 1e-5 * max(1.0, one[2])


def test_torchrun_with_a_rendezvous(hosts: tuple[Host, Host], clone: Path) -> None:
    environment = {"NNODES": "2", "RDZV": "hosta:29417", "NPROC": "1"}
    codes, said = ended(*(h.start(*arguments(clone, "torchrun"), cwd=clone, environment=environment) for h in hosts))
    assert codes == [0, 0], said
    assert_like_one_process(clone, "torchrun")
    assert "+ .venv/bin/torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint hosta:29417" in said
    assert all(f"+ GLOO_SOCKET_IFNAME=v{host.namespace}" in said for host in hosts)


@pytest.mark.parametrize("remote", ["ssh", "pdsh"])
def test_deepspeed_with_a_hostfile(hosts: tuple[Host, Host], clone: Path, remote: str) -> None:
    if shutil.which(remote) is None:
        pytest.skip(f"needs {remote}")
    (clone / "hosts").write_text("# two\nhosta slots=1\nhostb  slots=1\n", encoding="utf-8")
    run = f"by_{remote}"
    environment = {"HOSTFILE": "hosts", "REMOTE": remote}
    codes, said = ended(hosts[0].start(*arguments(clone, run, NAME), cwd=clone, environment=environment))
    assert codes == [0], said
    assert_like_one_process(clone, run)
    assert load_config(clone / run / "config.yaml").name == NAME.removeprefix("name=")
    assert "+ .venv/bin/deepspeed --hostfile hosts --no_ssh --node_rank 1 --master_addr hosta" in said
    assert all(f"+ GLOO_SOCKET_IFNAME=v{host.namespace}" in said for host in hosts)


def test_a_mistake_is_said_once_a_host_and_nothing_is_left_running(hosts: tuple[Host, Host], clone: Path) -> None:
    (clone / "hosts").write_text("hosta slots=2\nhostb slots=2\n", encoding="utf-8")
    idle = [len(host.processes()) for host in hosts]
    codes, said = ended(hosts[0].start(*arguments(clone, "refused"), cwd=clone, environment={"HOSTFILE": "hosts"}))
    assert codes == [2], said
    assert said.count("sisa: training.global_batch_tokens is 4 windows") == 1, said
    assert said.count("training.global_batch_tokens is 4 windows") <= 2 and "Traceback" not in said, said
    assert_left(hosts, idle)


def test_the_end_of_launch_sh_ends_both_hosts(hosts: tuple[Host, Host], clone: Path) -> None:
    (clone / "hosts").write_text("hosta slots=1\nhostb slots=1\n", encoding="utf-8")
    idle = [len(host.processes()) for host in hosts]
    command = arguments(clone, "ended", "training.steps=100000", "logging.every=1")
    started = hosts[0].start(*command, cwd=clone, environment={"HOSTFILE": "hosts"})
    assert started.stdout is not None
    for line in started.stdout:
        if "step " in line:
            break
    started.terminate()
    codes, said = ended(started)
    assert codes == [143], said
    assert_left(hosts, idle)


def assert_left(hosts: tuple[Host, Host], idle: list[int]) -> None:
    deadline = time.monotonic() + 40
    while (left := [len(host.processes()) for host in hosts]) != idle and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == idle
