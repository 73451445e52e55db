#!/usr/bin/env bash
# From a fresh clone to a trained model or a tested tree: makes .venv/ the first time, then runs what is asked.
#   ./launch.sh quickstart [--set KEY=VALUE …]    tokenizer, shards, training, evaluation, plot, sample
#   ./launch.sh compare [--all | --systems A,B …] mixers side by side: trained, evaluated, one page (--help: the rest)
#   ./launch.sh test [pytest arguments]           the test suite
#   ./launch.sh train CONFIG [--set KEY=VALUE …]  prepares the data where it is not, then trains: on one process, or on
#                                                 all local GPUs under torchrun (NPROC=n to choose); on several hosts;
#                                                 a run of stages stage by stage, each on the processes it wants
#         HOSTFILE=hosts ./launch.sh train …        from one of them, by deepspeed over ssh (lines `name slots=8`)
#         NNODES=2 RDZV=host:port ./launch.sh …     run on each, by torchrun (NODE_RANK=0… says which keeps the port)
#         sbatch tools/slurm_train.sbatch CONFIG …  or in any SLURM allocation: one rank a task, by srun
#   ./launch.sh prepare|data|eval|lm-eval|generate|stages|estimate|report|doctor …  the sisa command of that name
#   ./launch.sh setup                             only the environment
# Several hosts need this folder, with its .venv/ and the data, at one path. Shown as + NAME=VALUE, a variable is set by
# this script unless you did; DS_ACCELERATOR and GLOO_SOCKET_IFNAME only on a host without GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=.venv
py=$venv/bin/python
torchrun=("$py" -m sisa_dist.torchrun)

usage() { sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

refuse() {
    echo "launch.sh: $*" >&2
    exit 2
}

setup() {
    local wanted stamp=$venv/.installed
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    [ ! -L "$venv" ] || refuse "$venv is a link to another checkout's environment: remove it, or run ./launch.sh there"
    local python=${PYTHON:-python3} cpu=()
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        refuse "Python 3.11 or newer is needed: install it or name one with PYTHON=/path/to/python3"
    echo "+ making the environment in $venv/ (once, some minutes)"
    # Without pip it is what an interrupted first time left.
    "$py" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
    # torch by its exact version first, so that nothing else decides which build is taken.
    "$py" -m pip install --quiet --no-compile --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
    # What is there by now, torch above all, on the core that pip leaves idle; the rest Python compiles when it is first
    # imported (pip would compile all of it: a minute more).
    "$py" -m compileall -qq "$venv/lib" >/dev/null 2>&1 &
    # DeepSpeed compiles no kernel here (DS_BUILD_OPS=0), nor do we use one that it would compile at run time.
    [ "$(gpus)" -gt 0 ] || cpu=(DS_ACCELERATOR=cpu)
    env DS_BUILD_OPS=0 "${cpu[@]}" "$py" -m pip install --quiet --no-compile --constraint constraints.txt \
        --editable '.[test,deepspeed]'
    wait
    echo "$wanted" >"$stamp"
}

# Of several processes on this host the first speaks.
show() { [ "${LOCAL_RANK:-0}" != 0 ] || echo "+ $*"; }

run() {
    show "$@"
    "$@"
}

# Beside us, in a process group of its own.
start() {
    show "$@"
    setsid "$@" &
}

# In our place, so that signals and the exit code are the command's own.
become() {
    show "$@"
    exec "$@"
}

# NAME VALUE: exported unless the user has.
default() {
    [ -n "${!1:-}" ] || export "$1=$2"
    show "$1=${!1}"
}

# The data of a `train` command: once, before there are ranks.
prepare() {
    local argument arguments=()
    for argument in "$@"; do
        [ "$argument" = --accept-changes ] || arguments+=("$argument")
    done
    run "$venv/bin/sisa" prepare "${arguments[@]}"
}

gpus() { PYTHONWARNINGS=ignore "$py" -c 'import torch; print(torch.cuda.device_count())'; }

# The network interface by which this host meets the others at host $1. Left alone, gloo takes the address of this
# host's own name, which /etc/hosts often makes loopback; so may the meeting host's own view of its name.
interface() {
    local address
    address=$(getent ahostsv4 "$1" | sed -n '1s/ .*//p')
    case $address in
    '' | 127.*) ip -4 -o route show default | sed -n '1s/.* dev \([^ ]*\).*/\1/p' ;;
    *)
        address=$(ip -4 -o route get "$address" | sed -n '1s/.* src \([^ ]*\).*/\1/p')
        ip -4 -o address show to "$address" | sed -n '1s/^[^ ]* *\([^ ]*\).*/\1/p'
        ;;
    esac
}

# The variables that matter on this host: $1 threads a process, and host $2 where they meet (none: all are here).
settings() {
    local name
    default OMP_NUM_THREADS "$1"
    [ "$(gpus)" = 0 ] || return 0
    default DS_ACCELERATOR cpu
    [ -n "${2:-}" ] || return 0
    name=${GLOO_SOCKET_IFNAME:-$(interface "$2")}
    [ -n "$name" ] || refuse "no network interface found that leads to $2: set GLOO_SOCKET_IFNAME"
    default GLOO_SOCKET_IFNAME "$name"
}

# The threads of each of $1 processes on this host.
share() {
    local cores
    cores=$(nproc)
    echo $((cores > $1 ? cores / $1 : 1))
}

# All processes of this host.
train_here() {
    local processes=${NPROC:-$(gpus)}
    prepare "$@"
    [ "$processes" -gt 1 ] || become "$venv/bin/sisa" train "$@"
    settings "$(share "$processes")"
    become "${torchrun[@]}" --standalone --nproc-per-node "$processes" -m sisa_dist.cli train "$@"
}

# This host's part of a run whose hosts each call us with the same RDZV.
train_torchrun() {
    local processes=${NPROC:-$(gpus)} keeps=()
    [ "$processes" -gt 0 ] || processes=1
    [ -n "${NNODES:-}" ] || refuse "RDZV=$RDZV: set NNODES to the number of hosts too"
    [ -n "${RDZV:-}" ] || refuse "NNODES=$NNODES: set RDZV=host:port too, a free port of one of the hosts"
    # By itself torchrun sees whether it is at RDZV only where this host's name resolves to that address.
    [ -z "${NODE_RANK:-}" ] || keeps=(--rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
    [ "${NODE_RANK:-0}" != 0 ] || prepare "$@"
    settings "$(share "$processes")" "${RDZV%:*}"
    become "${torchrun[@]}" --nnodes "$NNODES" --nproc-per-node "$processes" \
        --rdzv-backend c10d --rdzv-endpoint "$RDZV" "${keeps[@]}" -m sisa_dist.cli train "$@"
}

# `name slots` of every line of the hostfile that says so.
hostfile() {
    sed -n 's/^[[:space:]]*\([^#[:space:]][^[:space:]]*\)[[:space:]]\{1,\}slots=\([0-9]\{1,\}\).*/\1 \2/p' "$HOSTFILE"
}

# Starts `launch.sh node` on every host of a DeepSpeed hostfile, by ssh or, with REMOTE=pdsh, by pdsh.
# `deepspeed` runs on each (--no_ssh), not here: from here it knows only pdsh, hands on no quotes, takes this host's
# accelerator for everybody's, and ends a run by pkill -f on all hosts, other people's runs of it included. pdsh is not
# the first choice, since where one host fails it waits for the others to notice.
train_hostfile() {
    local hosts host name node=0 remote sent
    [ -f "$HOSTFILE" ] || refuse "HOSTFILE=$HOSTFILE: no such file: one line a host, e.g. worker-1 slots=8"
    mapfile -t hosts < <(hostfile | cut -d ' ' -f 1)
    [ "${#hosts[@]}" -gt 0 ] || refuse "HOSTFILE=$HOSTFILE: no line like worker-1 slots=8"
    prepare "$@"
    : "${MASTER_ADDR:=${hosts[0]#*@}}" "${MASTER_PORT:=29500}"
    # What you set for the network and the threads goes along; of the rest each host decides by its own devices.
    mapfile -t sent < <(compgen -e | sed -n '/^\(NCCL\|UCX\|GLOO\|OMP\|TORCH\|PYTORCH\)_/p')
    printf -v remote 'cd %q && exec env NODE_RANK=%%n' "$PWD"
    for name in HOSTFILE MASTER_ADDR MASTER_PORT "${sent[@]}"; do
        printf -v remote '%s %s=%q' "$remote" "$name" "${!name}"
    done
    remote+=$(printf ' %q' ./launch.sh node "$@")
    # The first to fail ends the others, and our end all: each stands in a process group of its own.
    trap 'kill -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' EXIT
    trap 'exit 143' TERM INT
    case ${REMOTE:-ssh} in
    pdsh)
        # shellcheck disable=SC2001 # %n is the host's number to pdsh, %% is %
        remote=$(sed 's/%/%%/g; s/NODE_RANK=%%n/NODE_RANK=%n/' <<<"$remote")
        node=1
        start pdsh -R ssh -b -S -f "${#hosts[@]}" -w "$(IFS=, && echo "${hosts[*]}")" "$remote"
        ;;
    ssh)
        for host in "${hosts[@]}"; do
            start ssh -n -o BatchMode=yes "$host" "${remote/NODE_RANK=%n/NODE_RANK=$node}"
            node=$((node + 1))
        done
        ;;
    *) refuse "REMOTE=$REMOTE: ssh or pdsh" ;;
    esac
    while ((node--)); do wait -n; done
}

# One host of a HOSTFILE run.
train_node() {
    local connection=$PPID slots
    # sshd leaves a command running when the connection goes: then all of it has to go.
    {
        while kill -0 "$connection"; do sleep 1; done
        kill -TERM 0
    } </dev/null >/dev/null 2>&1 &
    # shellcheck disable=SC2064 # this process, now
    trap "kill $!" EXIT
    slots=$(hostfile | sed -n "$((NODE_RANK + 1))s/.* //p")
    settings "$(share "$slots")" "$MASTER_ADDR"
    run "$venv/bin/deepspeed" --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" \
        --master_port "$MASTER_PORT" --no_local_rank --module sisa_dist.cli train "$@"
}

# Where the processes of a SLURM job meet: its first host, and a port that two jobs on one host rarely share.
meet() {
    default MASTER_ADDR "$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | sed -n 1p)"
    default MASTER_PORT $((15000 + SLURM_JOB_ID % 15000))
}

# In a SLURM allocation: a task is a rank, without torchrun between, which would pass on neither SIGUSR1 nor the exit
# code that asks for a requeue. For that code's sake, too, the first task to end does not kill the others at once.
train_srun() {
    local tasks=${NPROC:-${SLURM_TASKS_PER_NODE%%[!0-9]*}} options=(--kill-on-bad-exit=0 --wait=60)
    [ "${wanted:-all}" != all ] || [ "${SLURM_GPUS_ON_NODE:-0}" -le "$tasks" ] || # a stage may want fewer
        refuse "$SLURM_GPUS_ON_NODE GPUs but $tasks task(s) a node: ask SLURM for --ntasks-per-node=$SLURM_GPUS_ON_NODE"
    [ -z "${NPROC:-}" ] || options+=(--ntasks="$((NPROC * SLURM_JOB_NUM_NODES))" --ntasks-per-node="$NPROC")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it
    prepare "$@"
    meet
    become srun "${options[@]}" ./launch.sh rank "$@"
}

# A run of stages, of which the first to train wants $1 processes, or `all`. Where the next wants others, training leaves
# with 76, and they are started here. Signals and every other exit code go through, as if we were not there.
train_stages() {
    local wanted=$1 given=${NPROC:-} num_hosts=${NNODES:-${SLURM_JOB_NUM_NODES:-1}} run code=76 asked='' signalled
    shift
    run=''
    trap 'asked=yes signalled=yes; kill -USR1 $run 2>/dev/null || :' USR1 # between two stages there is none to tell
    trap 'asked=yes signalled=yes; kill -TERM $run 2>/dev/null || :' TERM INT # a command beside us ignores INT
    while [ "$code" = 76 ]; do
        [ -z "$asked" ] || exit 75 # saved, and not to go on now
        NPROC=$given
        if [ "$wanted" != all ]; then
            [ $((wanted % num_hosts)) = 0 ] || refuse "a stage wants $wanted processes, which $num_hosts hosts cannot share alike"
            NPROC=$((wanted / num_hosts))
        fi
        train_stage "$@" &
        run=$! signalled=yes
        while [ -n "$signalled" ]; do # a trap ends `wait` before its time
            signalled='' code=0
            wait "$run" || code=$?
        done
        [ "$code" != 76 ] || wanted=$(wanted "$@")
    done
    exit "$code"
}

# How many processes the stage to train wants, or `all`; nothing where the run has no stages.
wanted() { "$venv/bin/sisa" stages --processes "$@"; }

# One process of many, whoever started it: torchrun, or srun, ours or yours. It prepares no data.
train_rank() {
    local others=
    if [ -z "${RANK:-}" ]; then
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
        meet
        [ "$SLURM_STEP_NUM_NODES" = 1 ] || others=$MASTER_ADDR
        settings "${SLURM_CPUS_PER_TASK:-1}" "$others"
        # Where SLURM shows each task only its own GPU, that is number 0.
        [[ ${CUDA_VISIBLE_DEVICES:-,} == *,* ]] || export LOCAL_RANK=0
    fi
    become "$venv/bin/sisa" train "$@"
}

train() {
    local wanted
    if [ -n "${RANK:-}" ] || [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
        train_rank "$@"
    fi
    wanted=$(wanted "$@")
    if [ -n "$wanted" ]; then train_stages "$wanted" "$@"; else train_stage "$@"; fi
}

# Of a run, or of a run of stages as far as one launch goes.
train_stage() {
    if [ -n "${HOSTFILE:-}" ]; then
        train_hostfile "$@"
    elif [ -n "${RDZV:-}${NNODES:-}" ]; then
        train_torchrun "$@"
    elif [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
        train_srun "$@"
    else
        train_here "$@"
    fi
}

command=${1:-}
[ $# -gt 0 ] && shift
case "$command" in
quickstart)
    setup
    run "$py" tools/quickstart.py configs/quickstart.yaml "$@"
    ;;
compare)
    setup
    become "$py" tools/compare.py "$@"
    ;;
test)
    setup
    # A process a core (-n 0: in one), and files in the order that tests/conftest.py gives them.
    run "$py" -m pytest -n "$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" --dist loadfile --no-loadscope-reorder "$@"
    ;;
prepare | data | eval | lm-eval | generate | stages | estimate | report | doctor)
    setup
    run "$venv/bin/sisa" "$command" "$@"
    ;;
train | node | rank)
    [ $# -gt 0 ] || { usage >&2; exit 2; }
    setup
    case $command in
    node) train_node "$@" ;;
    rank) train_rank "$@" ;; # of our own srun, be it the only one
    *) train "$@" ;;
    esac
    ;;
setup) setup ;;
-h | --help | help) usage ;;
*)
    usage >&2
    exit 2
    ;;
esac
