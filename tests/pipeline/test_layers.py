"""Imports only point down: the pure core needs nothing that trains, and one module alone knows DeepSpeed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = """
    section augment_schema options_schema schema deepspeed_schema deepspeed_keys config config_file batch schedule order
    window augment rungs tally dataset plan experiment versions hosts remote reach environment rendezvous lease fault
    saves resume samples metrics record inventory scaling scaling_paper scaling_text divergence identity lr_curve
    sweep_file sweep_state buckets cost
""".split()
TRAINING = ("torch", "torchvision", "deepspeed", "timm", "webdataset")
NOT_FOR_SHARDS = ("torch", "deepspeed", "webdataset", "pipeline")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@lru_cache
def imported_packages(path: Path) -> set[str]:
    """Top-level names of every import in a file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {arg.value.split(".")[0] for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def newly_loaded(modules: list[str], watched: tuple[str, ...]) -> dict[str, list[str]]:
    """Which of `watched` each module brings into a fresh interpreter that imports them one after the other."""
    code = f"""
import importlib, sys
for module in {modules!r}:
    before = set(sys.modules)
    importlib.import_module(module)
    print(module, *[name for name in {watched!r} if name in sys.modules and name not in before])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {module: found for module, *found in lines}


def test_pure_core_imports_nothing_that_trains():
    modules = [f"pipeline.{name}" for name in CORE]
    assert newly_loaded(modules, TRAINING) == {module: [] for module in modules}


def test_the_check_sees_an_import():
    found = newly_loaded(["shards.errors", "pipeline.order"], ("numpy", "torch"))
    assert found == {"shards.errors": [], "pipeline.order": ["numpy"]}


def test_shards_import_nothing_that_trains():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in sources("shards")
    ]
    assert len(modules) > 5
    assert newly_loaded(modules, NOT_FOR_SHARDS) == {module: [] for module in modules}


def test_only_the_engine_imports_deepspeed():
    importing = [
        str(path.relative_to(ROOT))
        for package in ("pipeline", "shards")
        for path in sources(package)
        if "deepspeed" in imported_packages(path)
    ]
    assert importing == ["pipeline/engine.py"]


@pytest.mark.parametrize("path", sources("shards"), ids=lambda path: str(path.relative_to(ROOT)))
def test_shards_stand_alone(path):
    assert imported_packages(path).isdisjoint(NOT_FOR_SHARDS)


@pytest.mark.parametrize("name", CORE)
def test_pure_core_mentions_nothing_that_trains_even_inside_functions(name):
    assert imported_packages(ROOT / "pipeline" / f"{name}.py").isdisjoint(TRAINING)


def test_webdataset_reads_what_allows_no_random_access_and_nothing_else():
    importing = [
        str(path.relative_to(ROOT))
        for package in ("pipeline", "shards")
        for path in sources(package)
        if "webdataset" in imported_packages(path)
    ]
    assert importing == ["pipeline/stream.py"]
