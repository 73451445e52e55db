"""launch.sh on two hosts: by torchrun's rendezvous and by deepspeed over ssh and pdsh, to the loss of one process."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from multihost.clone import assert_like_one_process, overrides
from multihost.hosts import TIMEOUT, Host, ended
from sisa_dist.config import load_config

pytestmark = pytest.mark.multihost
NAME = 'name=two hosts, 100%n of "it\'s" $HOME; `true` *'  # what a shell on the way would like to read


def arguments(clone: Path, run: str, *more: str) -> list[str]:
    return ["./launch.sh", "train", "configs/quickstart.yaml"] + [
        f"--set={override}" for override in (*overrides(clone, run), *more)
    ]


def test_torchrun_with_a_rendezvous(hosts: tuple[Host, Host], clone: Path) -> None:
    environment = {"NNODES": "2", "RDZV": "hosta:29417", "NPROC": "1"}
    codes, said = ended(*(h.start(*arguments(clone, "torchrun"), cwd=clone, environment=environment) for h in hosts))
    assert codes == [0, 0], said
    assert_like_one_process(clone, "torchrun")
    begun = "+ .venv/bin/python -m sisa_dist.torchrun --nnodes 2 --nproc-per-node 1"
    assert f"{begun} --rdzv-backend c10d --rdzv-endpoint hosta:29417" in said
    assert all(f"+ GLOO_SOCKET_IFNAME=v{host.namespace}" in said for host in hosts)


@pytest.mark.parametrize(("remote", "engine"), [("ssh", "deepspeed"), ("pdsh", "fsdp2")])
def test_deepspeed_with_a_hostfile(hosts: tuple[Host, Host], clone: Path, remote: str, engine: str) -> None:
    if shutil.which(remote) is None:
        pytest.skip(f"needs {remote}")
    (clone / "hosts").write_text("# two\nhosta slots=1\nhostb  slots=1\n", encoding="utf-8")
    run = f"by_{remote}"
    environment = {"HOSTFILE": "hosts", "REMOTE": remote}
    more = [NAME, f"engine.kind={engine}", *(["engine.zero_stage=2"] if engine == "deepspeed" else [])]
    codes, said = ended(hosts[0].start(*arguments(clone, run, *more), cwd=clone, environment=environment))
    assert codes == [0], said
    assert_like_one_process(clone, run)
    assert load_config(clone / run / "config.yaml").name == NAME.removeprefix("name=")
    assert "+ .venv/bin/deepspeed --hostfile hosts --no_ssh --node_rank 1 --master_addr hosta" in said
    assert all(f"+ GLOO_SOCKET_IFNAME=v{host.namespace}" in said for host in hosts)


def test_a_mistake_is_said_once_a_host_and_nothing_is_left_running(hosts: tuple[Host, Host], clone: Path) -> None:
    (clone / "hosts").write_text("hosta slots=2\nhostb slots=2\n", encoding="utf-8")
    codes, said = ended(hosts[0].start(*arguments(clone, "refused"), cwd=clone, environment={"HOSTFILE": "hosts"}))
    assert codes == [2], said
    assert said.count("sisa: training.global_batch_tokens is 4 windows") == 1, said
    assert said.count("training.global_batch_tokens is 4 windows") <= 2 and "Traceback" not in said, said
    assert_nothing_runs(hosts)


def test_the_end_of_launch_sh_ends_both_hosts(hosts: tuple[Host, Host], clone: Path) -> None:
    (clone / "hosts").write_text("hosta slots=1\nhostb slots=1\n", encoding="utf-8")
    # Silent while it trains: a rank that prints would die of its closed output, whatever we did.
    command = arguments(clone, "ended", "training.steps=100000", "logging.every=100000")
    started = hosts[0].start(*command, cwd=clone, environment={"HOSTFILE": "hosts"})
    written, deadline = clone / "ended" / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not (written.is_file() and written.read_bytes().count(b"\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.2)
    started.terminate()
    codes, said = ended(started)
    assert codes == [143], said
    assert_nothing_runs(hosts)


def assert_nothing_runs(hosts: tuple[Host, Host]) -> None:
    """Only each host's sshd does, after a while: a watch looks once a second, and launchers wait for what they end."""
    deadline = time.monotonic() + 70
    while (left := [len(host.processes()) for host in hosts]) != [1, 1] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == [1, 1]
