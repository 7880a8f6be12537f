"""run.sh on machines that lack this or that: its own logic, with stubs for python3 and uv, and no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = "bash sh dirname cat cksum tr sed rm mkdir cp touch find".split()
# `pip` works unless the environment has the file no-pip; anything that is not set-up is written down
PYTHON = """#!/bin/sh
home=$(dirname "$0")/..
case "$*" in
*build_ext*)
    echo "build" >> "$LOG-of-builds"
    if [ -n "${BROKEN_COMPILER:-}" ]; then echo "error: Python.h"; exit 1; fi
    touch shards/jpeg/_native.abi3.so ;;
-c*) exit "${UNSUITABLE:-0}" ;;
"-m venv "*)
    echo "venv" >> "$LOG"
    mkdir -p "$3/bin"
    cp "$STUBS/python3" "$3/bin/python"
    if [ -n "${NO_ENSUREPIP:-}" ]; then touch "$3/no-pip" "$3/half-made"; exit 1; fi ;;
"-m pip --version") [ ! -e "$home/no-pip" ] ;;
"-m pip install --quiet uv") exit 1 ;;
"-m pip install "*) echo "pip" >> "$LOG"; [ -z "${NO_NETWORK:-}" ] && [ ! -e "$home/no-pip" ] ;;
*) echo "$0 $* | in $PWD | PYTHONPATH=${PYTHONPATH:-}" >> "$LOG" ;;
esac
"""
UV = """#!/bin/sh
case "$1" in
venv)
    echo "uv $*" >> "$LOG"
    mkdir -p .venv/bin
    cp "$STUBS/python3" .venv/bin/python
    case "$*" in *--seed*) ;; *) touch .venv/no-pip ;; esac ;;
pip) echo "uv pip" >> "$LOG"; [ -z "${NO_NETWORK:-}" ] ;;
esac
"""


class Machine:
    """A copy of the repository's set-up, in a folder whose name has a space, and a PATH with nothing else on it."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / "a folder" / "one hour"
        self.elsewhere = folder / "elsewhere"
        self.stubs, self.tools, self.log = folder / "stubs", folder / "tools", folder / "log"
        for path in (self.repo, self.elsewhere, self.stubs, self.tools):
            path.mkdir(parents=True)
        shutil.copy(ROOT / "run.sh", self.repo)
        for name in ("requirements.lock", "pyproject.toml"):
            (self.repo / name).write_text(name)
        self.source = self.repo / "shards" / "jpeg" / "native" / "decode.c"
        self.source.parent.mkdir(parents=True)
        self.source.write_text("int x;")
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.tools / tool).symlink_to(found)
        self.stub("python3", PYTHON)

    @property
    def venv(self) -> Path:
        return self.repo / ".venv"

    def stub(self, name: str, script: str) -> None:
        (self.stubs / name).write_text(script)
        (self.stubs / name).chmod(0o755)

    def run(self, *arguments: str, code: int = 0, cwd: Path | None = None, **environment: str) -> str:
        """What run.sh says."""
        path = os.pathsep.join((str(self.stubs), str(self.tools)))
        done = subprocess.run(
            [str(self.repo / "run.sh"), *arguments],
            cwd=cwd or self.repo,
            env={"PATH": path, "LOG": str(self.log), "STUBS": str(self.stubs), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def builds(self) -> int:
        """How often the C decoder was built, or tried to be, since the last call."""
        path = self.log.with_name(f"{self.log.name}-of-builds")
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return len(lines)

    def done(self) -> list[str]:
        """What the stubs were asked for since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help_installs_nothing(machine, word):
    (machine.stubs / "python3").unlink()
    text = machine.run(word, cwd=machine.elsewhere)
    assert "./run.sh train CONFIG" in text and "./run.sh setup" in text and "ONEHOUR_PYTHON" in text
    assert "#" not in text and "set -e" not in text
    assert not machine.venv.exists() and machine.done() == []


def test_setup_is_done_once(machine):
    assert "setting up" in machine.run("setup")
    assert machine.done() == ["venv", "pip", "pip"]
    assert machine.run("setup", cwd=machine.elsewhere) == ""
    assert machine.done() == []
    (machine.repo / "requirements.lock").write_text("newer")
    machine.run("setup")
    assert machine.done() == ["pip", "pip"], "into the same environment"


def test_python_without_ensurepip_is_not_believed_the_second_time(machine):
    for _ in range(2):
        assert "apt install python3-venv" in machine.run("setup", code=1, NO_ENSUREPIP="1")
        assert not machine.venv.exists() and machine.done() == ["venv"]
    machine.run("setup")
    assert machine.done() == ["venv", "pip", "pip"]


def test_uv_helps_a_python_without_ensurepip(machine):
    machine.stub("uv", UV)
    machine.run("setup", NO_ENSUREPIP="1")
    assert machine.done() == ["venv", "uv venv --quiet --seed --python python3 .venv", "uv pip", "uv pip"]
    assert not (machine.venv / "half-made").exists() and not (machine.venv / "no-pip").exists()


def test_uv_alone_is_enough(machine):
    machine.stub("uv", UV)
    machine.run("setup", UNSUITABLE="1")
    assert machine.done() == ["uv venv --quiet --seed --python 3.12 .venv", "uv pip", "uv pip"]


def test_an_environment_without_pip_is_made_anew(machine):
    (machine.venv / "bin").mkdir(parents=True)
    shutil.copy(machine.stubs / "python3", machine.venv / "bin" / "python")
    (machine.venv / "no-pip").touch()
    machine.run("setup")
    assert machine.done() == ["venv", "pip", "pip"] and not (machine.venv / "no-pip").exists()


@pytest.mark.parametrize("uv", [True, False])
def test_a_failed_installation_is_not_taken_for_done(machine, uv):
    if uv:
        machine.stub("uv", UV)
    machine.run("plan", "x.json", code=1, NO_NETWORK="1")
    assert not any(" plan " in line for line in machine.done())
    machine.run("plan", "x.json")
    assert any(" plan " in line for line in machine.done())


@pytest.mark.parametrize(
    ("arguments", "expected", "in_the_repository"),
    [
        (["plan", "my configs/x.json"], "-P -m pipeline.cli plan my configs/x.json", False),
        (["train", "x.json", "--set", "a=b c"], "-P -m pipeline.cli train x.json --set a=b c", False),
        (["shards", "verify", "data"], "-P -m shards.cli verify data", False),
        (["test", "-k", "x"], "-m pytest -n 2 --dist loadfile -k x", True),
        ([], "-m pipeline.cli train ds_configs/demo.json", True),
        (["demo", "--ranks", "1"], "-m pipeline.cli train ds_configs/demo.json --ranks 1", True),
    ],
)
def test_paths_are_the_callers_but_for_the_demo_and_the_tests(machine, arguments, expected, in_the_repository):
    machine.run("setup")
    machine.done()
    machine.run(*arguments, cwd=machine.elsewhere)
    folder = machine.repo if in_the_repository else machine.elsewhere
    assert machine.done()[-1] == f"{machine.venv}/bin/python {expected} | in {folder} | PYTHONPATH="


def test_called_by_a_relative_path_or_a_bare_name(machine):
    machine.run("setup")
    machine.done()
    for command in (["../a folder/one hour/run.sh"], ["bash", "../a folder/one hour/run.sh"]):
        environment = {"PATH": f"{machine.tools}", "LOG": str(machine.log), "CDPATH": ".:/"}
        subprocess.run([*command, "plan", "x"], cwd=machine.elsewhere, env=environment, check=True, timeout=60)
        [line] = machine.done()
        assert line.startswith(f"{machine.venv}/bin/python -P -m pipeline.cli plan x | in {machine.elsewhere} ")


def test_onehour_python_is_used_as_it_is(machine):
    """Its packages too, wherever the caller is, and also named relative to there."""
    python = machine.elsewhere / "my python"
    shutil.copy(machine.stubs / "python3", python)
    for named in (str(python), "./my python"):
        for arguments, folder in ((["plan", "x"], machine.elsewhere), (["demo"], machine.repo)):
            machine.run(*arguments, cwd=machine.elsewhere, ONEHOUR_PYTHON=named, PYTHONPATH="theirs")
            line = machine.done()[-1]
            assert line.endswith(f" | in {folder} | PYTHONPATH={machine.repo}:theirs")
    machine.run("setup", ONEHOUR_PYTHON="python3")
    assert not machine.venv.exists() and machine.done() == []


def make_newer(path: Path) -> None:
    later = time.time() + 5
    os.utime(path, (later, later))


def test_the_c_decoder_is_built_when_it_is_missing_or_older_than_a_source(machine):
    built = machine.repo / "shards" / "jpeg" / "_native.abi3.so"
    machine.run("plan", "x")
    assert built.exists() and machine.builds() == 1
    machine.run("plan", "x")
    make_newer(machine.source.parent)  # an editor's scratch file has come and gone
    machine.run("plan", "x")
    assert machine.builds() == 0
    make_newer(machine.source)
    machine.run("plan", "x", ONEHOUR_PYTHON=str(machine.stubs / "python3"))
    assert machine.builds() == 1


def test_a_c_decoder_that_cannot_be_built_is_said_once_and_costs_nothing_more(machine):
    built, log = (machine.repo / "shards" / "jpeg" / name for name in ("_native.abi3.so", "_native.log"))
    machine.run("plan", "x")
    machine.builds()
    make_newer(machine.source)
    said = machine.run("plan", "x", BROKEN_COMPILER="1")
    assert "could not be built" in said and str(log) in said and "Python.h" in log.read_text()
    assert not built.exists(), "one of other sources must not be used"
    make_newer(log)
    assert "could not be built" not in machine.run("plan", "x", BROKEN_COMPILER="1")
    assert machine.builds() == 1
    assert "could not be built" in machine.run("setup", BROKEN_COMPILER="1"), "asked for, it is tried again"
    machine.run("setup")
    assert built.exists() and not log.exists() and machine.builds() == 2
