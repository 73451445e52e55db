#!/usr/bin/env bash
# From a fresh clone to a trained model or a tested tree: makes .venv/ the first time, then runs what is asked.
#   ./launch.sh quickstart [--set KEY=VALUE …]    tokenizer, shards, training, evaluation, plot, sample
#   ./launch.sh test [pytest arguments]           the test suite
#   ./launch.sh train CONFIG [--set KEY=VALUE …]  prepares the data where it is not, then trains: on one process, or on
#                                                 all local GPUs under torchrun (NPROC=n to choose)
#   ./launch.sh prepare|eval|generate|doctor …    the sisa command of that name
#   ./launch.sh setup                             only the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=.venv
py=$venv/bin/python

usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

setup() {
    local wanted stamp=$venv/.installed
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        { echo "launch.sh: Python 3.11 or newer is needed: install it or name one with PYTHON=/path/to/python3" >&2; exit 2; }
    echo "+ making the environment in $venv/ (once, a minute or two)"
    # Without pip it is what an interrupted first time left.
    "$py" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
    # torch by its exact version first, so that nothing else decides which build is taken.
    "$py" -m pip install --quiet --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
    "$py" -m pip install --quiet --constraint constraints.txt --editable '.[test]'
    echo "$wanted" >"$stamp"
}

run() {
    echo "+ $*"
    "$@"
}

# The data of a `train` command: once, before there are ranks.
prepare() {
    local argument arguments=()
    [ -n "${RANK:-}" ] && return
    for argument in "$@"; do
        [ "$argument" = --accept-changes ] || arguments+=("$argument")
    done
    run "$venv/bin/sisa" prepare "${arguments[@]}"
}

gpus() { "$py" -c 'import torch; print(torch.cuda.device_count())'; }

command=${1:-}
[ $# -gt 0 ] && shift
case "$command" in
quickstart)
    setup
    run "$py" tools/quickstart.py configs/quickstart.yaml "$@"
    ;;
test)
    setup
    run "$py" -m pytest "$@"
    ;;
prepare | eval | generate | doctor)
    setup
    run "$venv/bin/sisa" "$command" "$@"
    ;;
train)
    [ $# -gt 0 ] || { usage >&2; exit 2; }
    setup
    prepare "$@"
    processes=${NPROC:-$(gpus)}
    if [ "$processes" -gt 1 ]; then
        run "$venv/bin/torchrun" --standalone --nproc-per-node "$processes" -m sisa_dist.cli train "$@"
    else
        run "$venv/bin/sisa" train "$@"
    fi
    ;;
setup) setup ;;
-h | --help | help) usage ;;
*)
    usage >&2
    exit 2
    ;;
esac
