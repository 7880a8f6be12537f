#!/usr/bin/env bash
# onehour on a fresh machine: sets itself up, then does what it is told.
#
#   ./run.sh                      the demo: prepare shards, train, evaluate, report
#   ./run.sh test [pytest args]   the tests
#   ./run.sh train CONFIG …       train, e.g. ./run.sh train ds_configs/imagenet_8k.json --hostfile hosts
#   ./run.sh launch CONFIG …      the same, and go on without a host that fails: --restarts 10 --min-nodes 2
#   ./run.sh sweep FILE …         the runs of a table or a figure, e.g. ds_configs/sweeps/table1.yaml
#   ./run.sh plan|doctor|lr-find|checkpoints|evaluate|report|audit … the other onehour commands
#   ./run.sh shards prepare|verify|index …       the shard tool
#   ./run.sh setup                only what every command does first, where it is not done yet: make .venv
#   ./run.sh help                 this text
#
# Paths are relative to where you are; the demo and the tests run in the repository, wherever you are.
# ONEHOUR_PYTHON=/path/to/python uses that interpreter's packages as they are (a container that brings its own
# torch); otherwise everything goes into .venv, at the versions of requirements.lock.
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ "${1:-}" =~ ^(help|-h|--help)$ ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$here/run.sh"
    exit
fi
unset PYTHONDONTWRITEBYTECODE # every rank of every launch would compile thousands of modules again

say() { printf '%s\n' "$*" >&2; }

suitable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

# pip too: `python3 -m venv` that fails for want of ensurepip leaves a python behind
usable_venv() { [ -x .venv/bin/python ] && suitable .venv/bin/python && .venv/bin/python -m pip --version &>/dev/null; }

find_python() {
    local candidate
    for candidate in python3 python3.12 python3.11 python3.13 python; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    rm -rf .venv
    if python=$(find_python); then
        "$python" -m venv .venv &>/dev/null && return
        # Debian's python3 comes without ensurepip
        rm -rf .venv
        command -v uv >/dev/null && uv venv --quiet --seed --python "$python" .venv && return
        say "run.sh: $python cannot make a virtual environment."
        say "  Install its venv module (Debian: apt install python3-venv), or uv."
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --python 3.12 .venv && return
    else
        say "run.sh: no Python 3.11, 3.12 or 3.13 found."
        say "  Install one (Debian: apt install python3 python3-venv), or uv."
    fi
    exit 1
}

install_locked() {
    # uv is several times faster; pip is the fall-back, and knows mirrors that only pip is configured for
    local uv=""
    if command -v uv >/dev/null; then
        uv=uv
    elif .venv/bin/python -m pip install --quiet uv 2>/dev/null; then
        uv=.venv/bin/uv
    fi
    if [ -z "$uv" ] || ! "$uv" pip install --quiet --python .venv/bin/python -r requirements.lock; then
        .venv/bin/python -m pip install --quiet -r requirements.lock
    fi
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e . && return
    fi
    .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
}

set_up() {
    local stamp
    stamp=.venv/installed-$(cat requirements.lock pyproject.toml | cksum | tr ' ' '-')
    [ -e "$stamp" ] && [ -x .venv/bin/python ] && return
    say "setting up .venv (once; torch alone is some gigabytes)"
    usable_venv || make_venv
    install_locked
    rm -f .venv/installed-*
    touch "$stamp"
}

# The C decoder, where it is missing or older than its sources. Without it images are decoded by a slower rung, so a
# failure is said once and not tried again until a source changes, or `./run.sh setup` is called.
build_extension() {
    local built=shards/jpeg/_native.abi3.so log=shards/jpeg/_native.log newest
    newest=$(find shards/jpeg/native -type f -newer "$built" -print -quit 2>/dev/null || echo missing)
    [ -e "$built" ] && [ -z "$newest" ] && return
    [ -e "$log" ] && [ -z "$(find shards/jpeg/native -type f -newer "$log" -print -quit)" ] && return
    rm -f "$built"
    "$1" -c 'from setuptools import setup; setup()' build_ext --inplace --force &>"$log" || true
    if [ -e "$built" ]; then
        rm -f "$log"
        touch "$built"
    else
        say "run.sh: the C decoder could not be built, images will be decoded by a slower one: $here/$log"
    fi
}

if [ -n "${ONEHOUR_PYTHON:-}" ]; then
    python=$ONEHOUR_PYTHON
    if [[ "$python" == */* && "$python" != /* ]]; then python=$PWD/$python; fi
    export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
else
    python=$here/.venv/bin/python
    (
        cd -- "$here"
        set_up
    )
    export PATH="$here/.venv/bin:$PATH"
fi
(
    cd -- "$here"
    [ "${1:-}" != setup ] || rm -f shards/jpeg/_native.log
    build_extension "$python"
)

# -P: a folder of the caller's that is called pipeline or shards is not ours
case "${1:-demo}" in
demo)
    shift || true
    cd -- "$here"
    "$python" -m shards.cli prepare demo data/demo
    "$python" -m pipeline.cli train ds_configs/demo.json "$@"
    cat <<'NEXT'
       ./run.sh train ds_configs/demo.json --set optimizer.params.lr=0.1 --run runs/demo-lr0.1
       ./run.sh report runs/demo runs/demo-lr0.1
       ./run.sh plan ds_configs/imagenet_8k.json --world-size 256 --samples 1281167
       ./run.sh shards prepare imagefolder YOUR_IMAGES data/yours
NEXT
    ;;
test)
    shift
    cd -- "$here"
    # two files at a time, for half of a launch is single-threaded imports; a container of its own may lack xdist
    [ -n "${ONEHOUR_PYTHON:-}" ] || set -- -n 2 --dist loadfile "$@"
    exec "$python" -m pytest "$@"
    ;;
setup) ;;
shards)
    shift
    exec "$python" -P -m shards.cli "$@"
    ;;
*)
    exec "$python" -P -m pipeline.cli "$@"
    ;;
esac
