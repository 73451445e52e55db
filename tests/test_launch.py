"""launch.sh, with a stand-in for Python and what it installs that writes down what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A venv is made by writing the tools into it; a broken one's pip fails.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >>"$LOG"
case "$*" in
"-m venv"*) mkdir -p "${!#}/bin"; for tool in python sisa torchrun; do cp "$0" "${!#}/bin/$tool"; done ;;
*device_count*) echo "${GPUS:-0}" ;;
esac
"""
BROKEN = '#!/bin/bash\n[ "$*" != "-m pip --version" ]\n'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    write(tmp_path / "python3", STAND_IN)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def launch(clone: Path, *arguments: str, code: int = 0, **environment: str) -> list[str]:
    """The commands it ran, without those of the environment's making."""
    log = clone / "log"
    log.unlink(missing_ok=True)
    log.touch()
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "NPROC")}
    made = {"PYTHON": str(clone / "python3"), "LOG": str(log)} | environment
    command = ["bash", str(clone / "launch.sh"), *arguments]
    ended = subprocess.run(command, cwd="/", env=kept | made, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    return log.read_text(encoding="utf-8").splitlines()


def test_a_fresh_clone_trains_after_preparing(clone: Path) -> None:
    train = ("train", "c.yaml", "--accept-changes", "--set", "name=a b")
    first = launch(clone, *train)
    assert "python3 -m venv --clear .venv" in first and any("--editable" in line for line in first)
    prepared, trains = "sisa prepare c.yaml --set name=a b", "train c.yaml --accept-changes --set name=a b"
    for gpus, launcher in (("1", "sisa"), ("2", "torchrun --standalone --nproc-per-node 2 -m sisa_dist.cli")):
        found = launch(clone, *train, GPUS=gpus)
        assert [line for line in found if not line.startswith("python ")] == [prepared, f"{launcher} {trains}"]
    assert "sisa prepare" not in " ".join(launch(clone, *train, RANK="1"))
    assert launch(clone, "train", code=2) == []


@pytest.mark.parametrize("command", ["prepare", "eval", "generate", "doctor"])
def test_the_sisa_commands_pass_through(clone: Path, command: str) -> None:
    launch(clone, "setup")
    assert launch(clone, command, "x", "--set", "a=1") == [f"sisa {command} x --set a=1"]


def test_a_half_made_environment_is_made_anew_and_a_whole_one_kept(clone: Path) -> None:
    write(clone / ".venv" / "bin" / "python", BROKEN)
    assert "python3 -m venv --clear .venv" in launch(clone, "setup")
    assert launch(clone, "setup") == []
    (clone / ".venv" / ".installed").unlink()  # other packages are wanted: the environment itself is sound
    found = launch(clone, "setup")
    assert "python -m pip --version" in found and not any("venv" in line for line in found)


def test_help_names_every_command(clone: Path) -> None:
    said = subprocess.run(["bash", str(clone / "launch.sh"), "help"], capture_output=True, text=True).stdout
    for command in ("quickstart", "test", "train CONFIG", "prepare|eval|generate|doctor", "setup"):
        assert f"./launch.sh {command}" in said
    assert said.splitlines()[-1].startswith("  ./launch.sh setup")
