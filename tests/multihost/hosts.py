"""Two hosts on one machine: network namespaces joined by veth, each with its own name, address and sshd.

They share the file system and the process ids. Whatever still runs in one when it is taken down is ended, by its id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 150  # seconds of one launch
SSHD = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
"""
SSH = """Host *
IdentityFile {folder}/key
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""


@dataclass(frozen=True)
class Host:
    name: str
    namespace: str
    tools: Path  # goes before PATH: an ssh that knows our key

    def command(self, *arguments: str) -> list[str]:
        """`arguments` as a command of this host."""
        named = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, self.name, *arguments]

    def start(self, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        kept = {key: os.environ[key] for key in ("HOME", "LANG", "OMP_NUM_THREADS") if key in os.environ}
        made = kept | {"PATH": f"{self.tools}:{os.environ['PATH']}"} | dict(environment or {})
        return subprocess.Popen(
            self.command(*arguments),
            cwd=cwd,
            env=made,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def processes(self) -> list[int]:
        """The ids of what runs on this host, its sshd among them."""
        said = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(line) for line in said.stdout.split()]


def ended(*started: subprocess.Popen[str], timeout: float = TIMEOUT) -> tuple[list[int], str]:
    """Exit codes, and all that was said."""
    deadline, codes, said = time.monotonic() + timeout, [], ""
    for process in started:
        try:
            said += process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            said += f"{process.communicate()[0]}\n--- killed after {timeout} s"
        codes.append(process.returncode)
    return codes, said


def why_not() -> str | None:
    """Why this machine cannot play two hosts, or None."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("ip", "unshare", "ssh", "ssh-keygen", "/usr/sbin/sshd"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    probe = f"sisa{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """`hosta` and `hostb`, which reach each other by these names; `folder` takes their keys."""
    mark = secrets.token_hex(2)
    tools = folder / "tools"
    tools.mkdir(parents=True)
    _keys(folder, tools)
    hosts = tuple(Host(f"host{letter}", f"sisa{mark}{letter}", tools) for letter in "ab")
    addresses = {host: f"10.213.7.{number}" for number, host in enumerate(hosts, start=1)}
    names = "127.0.0.1 localhost\n" + "".join(f"{addresses[host]} {host.name}\n" for host in hosts)
    try:
        for host in hosts:
            _do("ip", "netns", "add", host.namespace)
            configured = Path("/etc/netns", host.namespace)
            configured.mkdir(parents=True)
            (configured / "hosts").write_text(names, encoding="utf-8")
        a, b = (host.namespace for host in hosts)
        _do("ip", "link", "add", f"v{a}", "netns", a, "type", "veth", "peer", "name", f"v{b}", "netns", b)
        for host in hosts:
            space, link = ("ip", "-n", host.namespace), f"v{host.namespace}"
            _do(*space, "address", "add", f"{addresses[host]}/24", "dev", link)
            _do(*space, "link", "set", "lo", "up")
            _do(*space, "link", "set", link, "up")
            _do(*host.command("/usr/sbin/sshd", "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")))
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            _end(host)
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
            shutil.rmtree(Path("/etc/netns", host.namespace), ignore_errors=True)


def _keys(folder: Path, tools: Path) -> None:
    for name in ("key", "host_key"):
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder), encoding="utf-8")
    (folder / "ssh_config").write_text(SSH.format(folder=folder), encoding="utf-8")
    ssh = tools / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n', encoding="utf-8")
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd drops its privileges; its package makes it at boot


def _end(host: Host) -> None:
    deadline = time.monotonic() + 10
    while (found := host.processes()) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
