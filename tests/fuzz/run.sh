#!/usr/bin/env bash
# Fuzz the JPEG decoder under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer.
#
#   tests/fuzz/run.sh                      45 seconds
#   tests/fuzz/run.sh RUNS [OPTION …]      that many inputs; options of libFuzzer, e.g. -seed=7
#
# Inputs that reach something new are kept from one run to the next in ${ONEHOUR_FUZZ:-~/.cache/onehour/fuzz}, with the
# build; removing that folder is harmless. A finding is left there as finding-*, and the exit status is not 0.
# It needs clang with libFuzzer, and a python with numpy and Pillow ($PYTHON, or that of .venv).
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
native=$root/shards/jpeg/native
folder=${ONEHOUR_FUZZ:-${XDG_CACHE_HOME:-$HOME/.cache}/onehour/fuzz}
most_seconds=45

skip() {
    echo "SKIP: $*"
    exit 0
}

find_clang() {
    local candidate
    for candidate in ${CLANG:-clang clang-21 clang-20 clang-19 clang-18 clang-17 clang-16 clang-15 clang-14}; do
        if command -v "$candidate" >/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-$root/.venv/bin/python}" python3; do
        if "$candidate" -c 'import numpy, PIL' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# a signed sum that wraps without saying so is a finding
sanitizers=address,undefined,float-cast-overflow
flags=(-O2 -g -std=c11 -D_DEFAULT_SOURCE -ffp-contract=off -fno-omit-frame-pointer -fno-sanitize-recover=all)
flags+=("-I$native" "-I$here" -include "$here/watched_buffer.h")

build() {
    local source coverage objects=()
    echo "building with $clang" >&2
    for source in "$native"/*.c "$here/fuzz_decode.c" "$here/mutate.c"; do
        # comparisons are watched in the header alone: elsewhere that is most of the time, UBSan's own included
        coverage=(-fsanitize-coverage=inline-8bit-counters,pc-table,indirect-calls)
        case $source in
        */module.c) continue ;;    # Python's side
        */mutate.c) coverage=() ;; # what it reaches is nothing new
        */header.c) coverage=(-fsanitize=fuzzer-no-link) ;;
        esac
        objects+=("$work/$(basename "$source").o")
        "$clang" "${flags[@]}" -fsanitize=$sanitizers "${coverage[@]}" -c "$source" -o "${objects[-1]}" &
        while [ "$(jobs -r | wc -l)" -ge 2 ]; do wait -n; done
    done
    while [ -n "$(jobs -r)" ]; do wait -n; done
    "$clang" -fsanitize=fuzzer,"$sanitizers" "${objects[@]}" -lm -o "$work/fuzz"
    mv "$work/fuzz" "$target"
}

clang=$(find_clang) || skip "no clang"
python=$(find_python) || skip "no python with numpy and Pillow"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo 'int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return n > 9 && d[0]; }' >"$work/probe.c"
"$clang" -fsanitize=fuzzer,address,undefined "$work/probe.c" -o "$work/probe" 2>/dev/null ||
    skip "$clang has no libFuzzer, or no sanitizers (Debian: libclang-rt-dev)"

mkdir -p "$folder/corpus"
version=$({ cat "$native"/* "$here"/*.[ch] "$here/run.sh"; "$clang" --version; } | cksum | tr ' ' -)
target=$folder/fuzz-$version
if [ ! -x "$target" ]; then
    rm -f "$folder"/fuzz-*
    build
fi
"$python" "$here/make_corpus.py" "$work/seeds"

limits=(-max_total_time=$most_seconds)
if [ $# -gt 0 ]; then
    limits=(-runs="$1")
    shift
fi
export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1
status=0
"$target" "${limits[@]}" -max_len=2048 -len_control=0 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
    -artifact_prefix="$folder/finding-" "$@" "$folder/corpus" "$work/seeds" >"$work/log" 2>&1 || status=$?
if [ $status -ne 0 ]; then
    tail -n 80 "$work/log"
    echo "FINDING. To see it again: $target ${folder}/finding-…" >&2
    exit 1
fi
awk -v seeds="$(find "$work/seeds" -type f | wc -l)" '
    / cov: / {
        for (i = 1; i < NF; i++) { if ($i == "cov:") edges = $(i + 1); else if ($i == "corp:") kept = $(i + 1) }
    }
    /^stat::number_of_executed_units/ { executions = $2 }
    /^Done .* second/ { seconds = $(NF - 1) }
    END {
        printf "%d executions in %d s, %d exec/s, %d coverage edges, %d seeds, %d inputs kept: no finding\n",
            executions, seconds, executions / (seconds ? seconds : 1), edges, seeds, kept
    }' "$work/log"
