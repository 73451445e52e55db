"""launch.sh, with a stand-in for Python and what it installs that writes down what it is asked."""

from __future__ import annotations

import functools
import os
import shutil
import signal as signals
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A venv is made by writing the tools into it; a broken one's pip fails.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >>"$LOG"
case "$*" in
"-m venv"*) mkdir -p "${!#}/bin"; for tool in python sisa torchrun deepspeed; do cp "$0" "${!#}/bin/$tool"; done ;;
*device_count*) echo "${GPUS:-0}" ;;
"stages --processes "*)
    eval "${ASKED:-}"
    head -n 1 "$LOG.stages" 2>/dev/null ;;
*" train "* | "train "*)
    if [ -s "$LOG.stages" ]; then # the stage is done; another comes
        eval "${DURING:-}"
        sed -i 1d "$LOG.stages"
        [ ! -s "$LOG.stages" ] || exit 76
    fi
    env | grep -E "^($NAMES)=" | sort >>"$LOG" ;;
*"--editable"*) env | grep -E "^DS_" | sort >>"$LOG" ;;
esac
exit "${CODE:-0}"
"""
# Of the launchers of several hosts: ssh and srun do here what they would do there.
SSH = '#!/bin/bash\necho "ssh $4" >>"$LOG"\neval "exec env $CLEAN NAMES=\'$NAMES\' ${5#*exec env }"\n'
SRUN = """#!/bin/bash
echo "srun $*" >>"$LOG"
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NUM_NODES=2 SLURM_STEP_TASKS_PER_NODE="2(x2)"
for task in 0 1 2 3; do SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" || exit; done
"""
SCONTROL = '#!/bin/bash\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n'
IP = """#!/bin/bash
case "$*" in
*"route show default") echo "default via 10.0.0.254 dev eth9" ;;
*"route get 10.0.0.1") echo "10.0.0.1 dev eth0 src 10.0.0.2 uid 0" ;;
*"address show to 10.0.0.2") echo "7: eth0    inet 10.0.0.2/24 scope global eth0" ;;
*) exit 1 ;;
esac
"""
GETENT = '#!/bin/bash\n[ "$2" = n1 ] && echo "10.0.0.1       STREAM n1" || echo "127.0.1.1  STREAM $2"\n'
SLURM = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
SLURM |= {"SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TORCHRUN = "python -m sisa_dist.torchrun"
BROKEN = '#!/bin/bash\n[ "$*" != "-m pip --version" ]\n'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    write(tmp_path / "python3", STAND_IN)
    others = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "ip": IP,
        "getent": GETENT,
        "ssh": SSH,
        "nproc": "#!/bin/sh\necho 12\n",
    }
    for name, text in others.items():
        write(tmp_path / "tools" / name, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def launch(
    clone: Path, *arguments: str, code: int = 0, says: str = "", names: str = "-", **environment: str
) -> list[str]:
    """The commands it ran, without those of the environment's making; after `train` the variables among `names`."""
    log = clone / "log"
    log.unlink(missing_ok=True)
    log.touch()
    kept = {"PATH": f"{clone / 'tools'}:{os.environ['PATH']}"}
    made = {"PYTHON": str(clone / "python3"), "LOG": str(log), "NAMES": names} | environment
    command = ["bash", str(clone / "launch.sh"), *arguments]
    # A shell that starts the tests in the background ignores SIGINT for them, and a shell cannot trap what it ignores.
    hears = functools.partial(signals.signal, signals.SIGINT, signals.SIG_DFL)
    ended = subprocess.run(command, cwd="/", env=kept | made, capture_output=True, text=True, preexec_fn=hears)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stdout + ended.stderr
    return log.read_text(encoding="utf-8").splitlines()


def after_preparing(found: list[str], prepared: str) -> list[str]:
    """Without what it asks: for GPUs, and for the stages of the run, of which there are none."""
    found = [line for line in found if not line.startswith(("python -c", "python -m pip"))]
    assert found[0].startswith("sisa stages --processes ") and found[1] == prepared
    return found[2:]


def test_a_fresh_clone_trains_after_preparing(clone: Path) -> None:
    train = ("train", "c.yaml", "--accept-changes", "--set", "name=a b")
    first = launch(clone, *train)
    assert "python3 -m venv --clear .venv" in first and any("--editable .[test,deepspeed]" in line for line in first)
    assert "DS_BUILD_OPS=0" in first and "DS_ACCELERATOR=cpu" in first
    prepared, trains = "sisa prepare c.yaml --set name=a b", "train c.yaml --accept-changes --set name=a b"
    for gpus, launcher in (("1", "sisa"), ("2", f"{TORCHRUN} --standalone --nproc-per-node 2 -m sisa_dist.cli")):
        found = launch(clone, *train, GPUS=gpus)
        assert after_preparing(found, prepared) == [f"{launcher} {trains}"]
    assert launch(clone, *train, RANK="1", GPUS="8") == [f"sisa {trains}"]
    assert launch(clone, "train", code=2) == []


def test_deepspeed_is_installed_for_the_gpus_where_there_are_some(clone: Path) -> None:
    found = launch(clone, "setup", GPUS="1")
    assert "DS_BUILD_OPS=0" in found and "DS_ACCELERATOR=cpu" not in found


def test_local_processes_share_the_cores_and_gpu_hosts_get_no_cpu_settings(clone: Path) -> None:
    launch(clone, "setup")
    names, train = "OMP_NUM_THREADS|DS_ACCELERATOR|GLOO_SOCKET_IFNAME", ("train", "c.yaml")
    on_cpu = launch(clone, *train, names=names, NPROC="3", says="+ OMP_NUM_THREADS=4\n+ DS_ACCELERATOR=cpu\n")
    assert on_cpu[-2:] == ["DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=4"]
    assert launch(clone, *train, names=names, GPUS="8")[-1] == "OMP_NUM_THREADS=1"
    assert "DS_ACCELERATOR" not in " ".join(launch(clone, *train, names=names, GPUS="8"))
    kept = launch(clone, *train, names=names, GPUS="2", OMP_NUM_THREADS="9", GLOO_SOCKET_IFNAME="ib0")
    assert kept[-2:] == ["GLOO_SOCKET_IFNAME=ib0", "OMP_NUM_THREADS=9"]


def test_the_exit_code_is_the_commands(clone: Path) -> None:
    launch(clone, "setup")
    assert launch(clone, "train", "c.yaml", RANK="0", CODE="75", code=75) == ["sisa train c.yaml"]


def stages(clone: Path, *processes: str) -> None:
    (clone / "log.stages").write_text("".join(f"{number}\n" for number in processes), encoding="utf-8")


def test_stages_are_started_one_after_another_on_what_each_wants(clone: Path) -> None:
    launch(clone, "setup")
    train = ("train", "c.yaml", "--set", "a=b c")
    stages(clone, "2", "all", "4", "1")
    found = [line for line in launch(clone, *train, NPROC="3") if not line.startswith("python -c")]
    asks, prepares, trains = (
        f"{said} c.yaml --set a=b c" for said in ("sisa stages --processes", "sisa prepare", "train")
    )
    starts = [f"{TORCHRUN} --standalone --nproc-per-node {n} -m sisa_dist.cli {trains}" for n in (2, 3, 4)]
    assert found == [line for start in [*starts, f"sisa {trains}"] for line in (asks, prepares, start)]
    stages(clone, "all", "4")
    found = launch(clone, *train, NNODES="2", RDZV="n1:29400")
    begun = [line.split(" --rdzv")[0] for line in found if line.startswith(TORCHRUN)]
    assert begun == [f"{TORCHRUN} --nnodes 2 --nproc-per-node {n}" for n in (1, 2)]
    stages(clone, "3")
    launch(clone, *train, NNODES="2", RDZV="n1:29400", code=2, says="wants 3 processes, which 2 hosts cannot share")


@pytest.mark.parametrize("signal", ["TERM", "USR1", "INT"])
def test_a_signal_during_stages_reaches_what_trains_and_no_other_begins(clone: Path, signal: str) -> None:
    launch(clone, "setup")
    sent = "USR1" if signal == "USR1" else "TERM"
    saves = (
        f"trap 'echo got {sent} >>$LOG; exit 75' {sent}; kill -{signal} $PPID; for i in $(seq 50); do sleep 0.1; done"
    )
    stages(clone, "all", "all")
    found = launch(clone, "train", "c.yaml", DURING=saves, code=75)
    assert found[-1] == f"got {sent}" and found.count("sisa train c.yaml") == 1
    # It ends by itself, with the stage: as if asked to be run again.
    stages(clone, "all", "all")
    ends = f"trap : {sent}; kill -{signal} $PPID; sleep 0.2"
    found = launch(clone, "train", "c.yaml", DURING=ends, code=75)
    assert found.count("sisa train c.yaml") == 1


@pytest.mark.parametrize("signal", ["TERM", "USR1"])
def test_a_signal_between_two_stages_begins_no_other(clone: Path, signal: str) -> None:
    launch(clone, "setup")
    stages(clone, "all", "all")
    shell = '$(pgrep -o -f "${LOG%/*}/launch.sh train")'
    asked = f'[ "$(wc -l <"$LOG.stages")" != 1 ] || kill -{signal} {shell}'
    assert launch(clone, "train", "c.yaml", ASKED=asked, code=75).count("sisa train c.yaml") == 1


def test_another_exit_code_ends_the_stages(clone: Path) -> None:
    launch(clone, "setup")
    stages(clone, "all", "all")
    assert launch(clone, "train", "c.yaml", DURING="exit 3", code=3).count("sisa train c.yaml") == 1


def test_torchrun_leaves_with_the_code_of_its_ranks(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(76)\n", encoding="utf-8")
    command = [sys.executable, "-m", "sisa_dist.torchrun", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*command, str(tmp_path / "leaves.py")], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 76 and "ChildFailedError" not in ended.stderr, ended.stderr


@pytest.mark.parametrize("code", [1, -9])
def test_torchrun_reports_a_rank_that_failed(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    import sisa_dist.torchrun

    def fails(arguments: list[str] | None) -> None:
        raise ChildFailedError("train", {0: ProcessFailure(0, 1, code, "<N/A>")})

    monkeypatch.setattr(sisa_dist.torchrun, "torchrun", fails)
    with pytest.raises(ChildFailedError):
        sisa_dist.torchrun.main([])


def test_torchrun_on_several_hosts(clone: Path) -> None:
    launch(clone, "setup")
    train, names = ("train", "c.yaml", "--set", "a=b c"), "DS_ACCELERATOR|GLOO_SOCKET_IFNAME"
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint n1:29400"
    trains = "-m sisa_dist.cli train c.yaml --set a=b c"
    found = launch(clone, *train, names=names, NNODES="2", RDZV="n1:29400")
    assert after_preparing(found, "sisa prepare c.yaml --set a=b c") == [
        f"{TORCHRUN} --nnodes 2 --nproc-per-node 1 {rendezvous} {trains}",
        "DS_ACCELERATOR=cpu",
        "GLOO_SOCKET_IFNAME=eth0",
    ]
    # The meeting host may know itself as loopback.
    assert launch(clone, *train, names=names, NNODES="2", RDZV="me:29400")[-1] == "GLOO_SOCKET_IFNAME=eth9"
    for node, keeps in (("0", "true"), ("1", "false")):
        found = launch(clone, *train, names=names, NNODES="2", RDZV="n1:29400", NODE_RANK=node, GPUS="8")
        assert (
            found[-1] == f"{TORCHRUN} --nnodes 2 --nproc-per-node 8 {rendezvous} --rdzv-conf is_host={keeps} {trains}"
        )
        assert ("sisa prepare c.yaml --set a=b c" in found) == (node == "0")
    launch(clone, *train, code=2, says="set NNODES", RDZV="n1:29400")
    launch(clone, *train, code=2, says="set RDZV=host:port", NNODES="2")


def test_a_hostfile_starts_deepspeed_on_each_host(clone: Path) -> None:
    launch(clone, "setup")
    (clone / "hosts").write_text("# ours\n\nme@n1 slots=4\nn2  slots=2 # small\n", encoding="utf-8")
    train, names = ("train", "c.yaml", "--set", "a=$b 'c'"), "DS_ACCELERATOR|GLOO_SOCKET_IFNAME|OMP_NUM_THREADS|NCCL_X"
    # What this host decided for itself does not go along; it is asked for anew there.
    clean = "-u GPUS -u DS_ACCELERATOR"
    sent = {"HOSTFILE": "hosts", "NCCL_X": "1", "DS_ACCELERATOR": "here", "GPUS": "1", "CLEAN": clean}
    found = after_preparing(launch(clone, *train, names=names, **sent), "sisa prepare c.yaml --set a=$b 'c'")
    for node, (host, threads) in enumerate((("me@n1", 3), ("n2", 6))):
        command = (
            f"deepspeed --hostfile hosts --no_ssh --node_rank {node} --master_addr n1 --master_port 29500 "
            "--no_local_rank --module sisa_dist.cli train c.yaml --set a=$b 'c'"
        )
        assert f"ssh {host}" in found and command in found and f"OMP_NUM_THREADS={threads}" in found
    for line in ("DS_ACCELERATOR=cpu", "GLOO_SOCKET_IFNAME=eth0", "NCCL_X=1"):
        assert found.count(line) == 2
    assert "DS_ACCELERATOR=here" not in found
    launch(clone, *train, code=2, says="no such file", HOSTFILE="absent")
    (clone / "hosts").write_text("n1\n", encoding="utf-8")
    launch(clone, *train, code=2, says="no line like worker-1 slots=8", HOSTFILE="hosts")


def test_an_allocation_of_slurm_trains_a_rank_a_task(clone: Path) -> None:
    launch(clone, "setup")
    train, names = ("train", "c.yaml", "--set", "a=b c"), "[A-Z_]*RANK|WORLD_SIZE|MASTER_[A-Z]*|[A-Z_]*_IFNAME"
    found = launch(clone, *train, names=names, **SLURM, SLURM_CPUS_PER_TASK="7")
    started, *ranks = after_preparing(found, "sisa prepare c.yaml --set a=b c")
    options = "--kill-on-bad-exit=0 --wait=60"
    assert started == f"srun {options} --cpus-per-task=7 ./launch.sh rank c.yaml --set a=b c"
    for rank in range(4):
        assert ranks[7 * rank : 7 * rank + 7] == [
            "sisa train c.yaml --set a=b c",
            "GLOO_SOCKET_IFNAME=eth0",
            f"LOCAL_RANK={rank % 2}",
            "MASTER_ADDR=n1",
            "MASTER_PORT=20007",
            f"RANK={rank}",
            "WORLD_SIZE=4",
        ]
    # A task of your own srun finds the meeting place by itself.
    step = {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
    own = SLURM | step | {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "2"}
    assert launch(clone, *train, names=names, **own)[-7:] == ranks[14:21]
    # Each task sees one GPU of its own: number 0.
    found = launch(clone, *train, names="LOCAL_RANK", **SLURM, GPUS="1", CUDA_VISIBLE_DEVICES="3")
    assert found.count("LOCAL_RANK=0") == 4
    found = launch(clone, *train, **SLURM, NPROC="3")
    assert f"srun {options} --ntasks=6 --ntasks-per-node=3 ./launch.sh rank c.yaml --set a=b c" in found
    launch(clone, *train, **SLURM, SLURM_GPUS_ON_NODE="8", code=2, says="--ntasks-per-node=8")
    stages(clone, "2")  # of a run of stages, one on fewer processes than there are GPUs
    assert any("--ntasks-per-node=1" in line for line in launch(clone, *train, **SLURM, SLURM_GPUS_ON_NODE="8"))
    stages(clone, "1", "4")  # a task of ours begins no stage of its own, were it the only one
    alone = SLURM | {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    alone |= {"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    found = launch(clone, "rank", *train[1:], names="RANK|WORLD_SIZE", **alone, code=76)
    assert [line for line in found if not line.startswith("python")] == ["sisa train c.yaml --set a=b c"]
    (clone / "log.stages").unlink()
    assert launch(clone, *train, **SLURM, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="1")[-1].startswith("sisa train")


@pytest.mark.parametrize(
    ("train", "code", "requeued"),
    [
        ('trap "echo saved; exit 75" USR1; sleep 0.3; kill -USR1 $PPID; while :; do sleep 0.1; done', 75, True),
        ('trap "echo saved; exit 75" TERM; sleep 0.3; kill -TERM $PPID; while :; do sleep 0.1; done', 75, False),
        ("exit 3", 3, False),
        ("exit 0", 0, False),
    ],
)
def test_the_slurm_template_requeues_what_asks_for_it(clone: Path, train: str, code: int, requeued: bool) -> None:
    write(clone / "launch.sh", f'#!/bin/bash\necho "$*" >>"$LOG"\n{train}\n')
    write(clone / "tools" / "scontrol", '#!/bin/bash\necho "scontrol $*" >>"$LOG"\n')
    made = {"PATH": f"{clone / 'tools'}:{os.environ['PATH']}", "LOG": str(clone / "log")}
    made |= {"SLURM_SUBMIT_DIR": str(clone), "SLURM_JOB_ID": "7"}
    command = ["bash", str(ROOT / "tools" / "slurm_train.sbatch"), "c.yaml", "--set", "a=b c"]
    ended = subprocess.run(command, env=made, capture_output=True, text=True, timeout=8)
    assert ended.returncode == code and ("saved" in ended.stdout) == (code == 75)
    log = (clone / "log").read_text(encoding="utf-8").splitlines()
    assert log == ["train c.yaml --set a=b c", *(["scontrol requeue 7"] if requeued else [])]


def test_the_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(ROOT / "launch.sh"), str(ROOT / "tools" / "slurm_train.sbatch")]
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("command", ["prepare", "eval", "generate", "doctor"])
def test_the_sisa_commands_pass_through(clone: Path, command: str) -> None:
    launch(clone, "setup")
    assert launch(clone, command, "x", "--set", "a=1") == [f"sisa {command} x --set a=1"]


def test_compare_passes_through_with_its_exit_code(clone: Path) -> None:
    launch(clone, "setup")
    found = launch(clone, "compare", "--systems", "sisa,fox", "--plan", CODE="2", code=2)
    assert found == ["python tools/compare.py --systems sisa,fox --plan"]


def test_a_half_made_environment_is_made_anew_and_a_whole_one_kept(clone: Path) -> None:
    write(clone / ".venv" / "bin" / "python", BROKEN)
    assert "python3 -m venv --clear .venv" in launch(clone, "setup")
    assert launch(clone, "setup") == []
    (clone / ".venv" / ".installed").unlink()  # other packages are wanted: the environment itself is sound
    found = launch(clone, "setup")
    assert "python -m pip --version" in found and not any("-m venv" in line for line in found)
    assert sum("python -m compileall -qq .venv/lib" in line for line in found) == 1
    assert any("pip install" in line and line.endswith("--editable .[test,deepspeed]") for line in found)


def test_help_names_every_command(clone: Path) -> None:
    said = subprocess.run(["bash", str(clone / "launch.sh"), "help"], capture_output=True, text=True).stdout
    for command in (
        "quickstart",
        "compare",
        "test",
        "train CONFIG",
        "prepare|data|eval|lm-eval|generate|stages|estimate|report|doctor",
        "setup",
    ):
        assert f"./launch.sh {command}" in said
    for way in ("NPROC=", "HOSTFILE=", "RDZV=", "sbatch tools/slurm_train.sbatch"):
        assert way in said
    assert said.splitlines()[-1].endswith("only on a host without GPUs.")
