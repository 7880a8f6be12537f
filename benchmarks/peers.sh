#!/usr/bin/env bash
# Make the environment of benchmarks/loader.py: the loaders that ours is compared with, what ours needs, and this
# repository as it lies here. What cannot be installed is named, and the benchmark will skip it.
#
#   benchmarks/peers.sh DIR
#   DIR/bin/python benchmarks/loader.py IMAGES
#
# On Debian, as root, these system packages are installed first: the headers of libjpeg-turbo for the references, those
# of OpenCV and TurboJPEG for FFCV, the libraries of FFmpeg for spdl. Elsewhere, bring them yourself.
# PYTHON=/path/to/python makes the environment with another interpreter than python3 (3.11 to 3.13).
# Versions are those that were measured, so that the table can be made again.
set -uo pipefail
[ $# -eq 1 ] || {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
}
target=$1
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
missing=()

# measured with Python 3.11
pinned=(
    torch==2.14.1
    torchvision==0.29.1
    numpy==2.1.3
    pillow==13.0.0
    simplejpeg==1.9.0
    timm==1.0.31
    webdataset==1.0.2
    nvidia-dali-cuda120==2.4.0
    ffcv==1.0.2
    numba==0.68.1
    opencv-python-headless==5.0.0.93
    mosaicml-streaming==0.13.0
    litdata==0.2.76
    spdl==0.8.0
    spdl_core==0.8.0
    spdl_io==0.8.0
)

say() { printf '%s\n' "$*" >&2; }

# attempt NAME COMMAND …: run it quietly; what it said is shown if it fails
attempt() {
    local name=$1 said
    shift
    say "installing $name"
    if ! said=$("$@" 2>&1); then
        printf '%s\n' "$said" | grep -v '^WARNING' | tail -n 12 >&2
        say "NOT INSTALLED: $name"
        missing+=("$name")
        return 1
    fi
}

pip() { "$target/bin/python" -m pip install --quiet --constraint "$target/constraints.txt" "$@"; }

system_packages() {
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        gcc g++ pkg-config libjpeg62-turbo-dev libturbojpeg0-dev libopencv-dev ffmpeg
}

# its setup.py links every OpenCV library that pkg-config names, where two are used; and it asks for opencv-python,
# which wants libGL and lies in the same folder as opencv-python-headless
ffcv() {
    pip numba tqdm psutil terminaltables pytorch_pfn_extras fastargs assertpy opencv-python-headless &&
        LDFLAGS=-Wl,--as-needed pip --no-deps ffcv
}

# in the repository, where Python finds it; one that can be loaded is left as it is
extension() (
    cd -- "$here" || exit 1
    "$target/bin/python" -c 'import sys; from shards import jpeg; sys.exit(jpeg.unavailable() is not None)' && exit
    pip setuptools
    "$target/bin/python" -c 'from setuptools import setup; setup()' build_ext --inplace
)

if command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
    attempt 'system packages' system_packages
else
    say 'not root on Debian: system packages are left as they are'
fi
"${PYTHON:-python3}" -m venv "$target" || exit 1
target=$(CDPATH='' cd -- "$target" && pwd)
printf '%s\n' "${pinned[@]}" >"$target/constraints.txt"
# the trainer's dependencies, without deepspeed: nothing here starts an engine
mapfile -t needed < <("$target/bin/python" - "$here/pyproject.toml" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    needed = tomllib.load(file)["project"]["dependencies"]
print(*(each for each in needed if not each.startswith("deepspeed")), sep="\n")
PYTHON
)
attempt 'the dependencies of onehour' pip "${needed[@]}" || exit 1
"$target/bin/python" - "$here" <<'PYTHON'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "onehour.pth").write_text(sys.argv[1] + "\n")
PYTHON

attempt 'the C extension of onehour' extension
attempt DALI pip nvidia-dali-cuda120
attempt 'MosaicML Streaming' pip mosaicml-streaming
attempt litdata pip litdata
attempt spdl pip spdl
attempt FFCV ffcv

say ""
[ ${#missing[@]} -eq 0 ] || say "not installed, and so skipped: $(printf '%s; ' "${missing[@]}")"
say "now: $target/bin/python benchmarks/loader.py IMAGES"
