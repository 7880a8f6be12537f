"""Installing from a source distribution: with a C compiler the decoder is built, without one everything else works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_config

ROOT = Path(__file__).parents[1]


def call(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        cwd=environment.get("PWD"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    """What is released: made of the files that git knows, and nothing that a build has left."""
    source = tmp_path_factory.mktemp("source")
    files = call("git", "-C", ROOT, "ls-files", "-z").split("\0")
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("sdist")
    call(sys.executable, "-c", "from setuptools import setup; setup()", "sdist", "--dist-dir", out, PWD=str(source))
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_a_source_distribution_trains_with_and_without_a_compiler(distribution, compiler, tiny_shards, tmp_path):
    installed = tmp_path / "installed"
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--target", installed)
    call(sys.executable, "-m", "pip", "install", *options, distribution, CC=compiler)
    there = list(installed.glob("shards/jpeg/_native*.so"))
    assert len(there) == (compiler != "false")
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_config(tiny_shards, tmp_path / "run", **{"recipe.epochs": 1})))
    said = call(
        *(sys.executable, "-P", "-m", "pipeline.cli", "train", path, "--ranks", "2"),
        PYTHONPATH=str(installed),
        PWD=str(tmp_path),
    )
    assert "top-1" in said
    assert ("decode: C extension" if there else "decode: simplejpeg (why no faster one: onehour doctor)") in said
