"""Small real images, class folders and shards for the tests of `shards`."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.cli import main
from shards.writer import ShardWriter

REPOSITORY = Path(__file__).parents[2]


def make_image(number: int, kind: str = "JPEG", side: int = 12) -> bytes:
    """A small picture of noise, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session", name="make_image")
def make_image_fixture() -> Callable[..., bytes]:
    return make_image


def write_class_folders(root: Path, classes: int = 3, per_class: int = 5, kind: str = "JPEG") -> Path:
    """``root/class_<c>/image <i>.<extension>``, with every seventh JPEG really a PNG, as in ImageNet."""
    number = 0
    for c in range(classes):
        folder = root / f"class_{c}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            number += 1
            data = make_image(number, "PNG" if number % 7 == 0 else kind)
            (folder / f"image {i:04d}.JPEG").write_bytes(data)
    return root


@pytest.fixture(scope="session", name="write_class_folders")
def write_class_folders_fixture() -> Callable[..., Path]:
    return write_class_folders


@pytest.fixture(scope="session")
def two_splits(tmp_path_factory) -> Path:
    """A root with train/ (3 × 20 images) and val/ (3 × 7)."""
    root = tmp_path_factory.mktemp("source") / "images"
    write_class_folders(root / "train", per_class=20)
    write_class_folders(root / "val", per_class=7)
    return root


@pytest.fixture(scope="session")
def prepared(two_splits, tmp_path_factory) -> Path:
    """The data set made of `two_splits` by one worker; tests must not change it."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert main(["prepare", "imagefolder", str(two_splits), str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        # starting processes takes longer than the work itself; the tests that are about them ask for them
        workers = () if "--workers" in arguments else ("--workers", 1)
        code = main([str(argument) for argument in (*arguments, *workers)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


@pytest.fixture
def refuse(run) -> Callable[..., str]:
    """Run a command line that must be refused as a user's mistake; returns the message."""

    def refused(*arguments: object) -> str:
        code, _, message = run(*arguments)
        assert code == 2, (code, message)
        assert message.startswith("shards: ")
        assert "Traceback" not in message
        return message

    return refused


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen]:
    """Start the command line as a process in a session of its own."""

    def start_process(*arguments: object, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "shards.cli", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )

    return start_process


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """Digest of every file below a folder, by relative path."""

    def digests(root: Path) -> dict[str, str]:
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    return digests


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """Write a shard from (member name, data) pairs, each name as given."""

    def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            writer = ShardWriter(file)
            for name, data in members:
                key, extension = name.split(".", 1)
                writer._append(key, (extension, data))
            writer.close()
        return path

    return write
