"""The sweeps of ds_configs/sweeps: every arm resolves, is the paper's row, and stands beside what was published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import cli, config, plan, sweep_file
from pipeline.identity import changes_training, leaves
from tests.pipeline.test_paper import FIGURE, ROWS, short

SWEEPS = Path(__file__).resolve().parents[2] / "ds_configs" / "sweeps"
SHIPPED = sorted(SWEEPS.glob("*.yaml"))
IMAGES = {"imagenet_256": 1_281_167, "cifar10": 50_000, "cifar10_small": 10_000, "demo": 1_437}
PUBLISHED = {row[0]: row[-1] for row in ROWS} | {f"kn_{short(kn)}": error for kn, (_, error) in FIGURE.items()}
CIFAR10 = [f"cifar10_{size}{what}" for size in ("", "small_") for what in ("table1", "table2a", "figure1")]
# arms whose file in ds_configs/paper is not called by their name
FILES = {
    "kn-8k-no-warmup": "table1_no_warmup",
    "kn-8k-constant-warmup": "table1_constant_warmup",
    "kn-256-lr-0.05": "table2a_256_lr_0.05",
    "kn-256-lr-0.2": "table2a_256_lr_0.2",
    "kn-8k-lr-0.05": "table2a_8k_lr_0.05",
    "kn-8k-lr-0.2": "table2a_8k_lr_0.2",
    "kn-8k-fixed-lr": "table2a_8k_fixed_lr",
    "kn-8k-square-root": "table2a_8k_square_root",
    "kn-256-gamma-1": "table2b_256_gamma_1",
    "kn-8k-gamma-1": "table2b_8k_gamma_1",
    "resnet101-kn-256": "table2c_256_resnet101",
    "resnet101-kn-8k": "table2c_8k_resnet101",
}


def file_of(arm: str) -> str:
    return FILES.get(arm) or arm.replace("-", "_")


def training(path: Path, overrides: tuple[str, ...] = ()) -> dict:
    return {name: value for name, value in leaves(config.load(path, overrides).resolved()) if changes_training(name)}


def test_the_papers_sweeps_are_shipped():
    names = {path.stem for path in SHIPPED}
    assert {"table1", "table2a", "table2b", "table2c", "figure1"} <= names
    assert {*CIFAR10, "demo_minibatch"} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_run_resolves(path, tmp_path, monkeypatch, capsys):
    sweep = sweep_file.load(path)
    monkeypatch.chdir(tmp_path)
    runs = sweep.runs(Path("runs"))
    images = IMAGES[config.load(runs[0].config).name]
    for run in runs:
        loaded = config.load(run.config, run.overrides)
        assert loaded.recipe.seed == run.seed
        resolved = plan.resolve(loaded, 1, samples=images)
        # the error is the median of the last five epochs, which are at the last rate, as in the paper
        last = loaded.blocks.scheduler.params.milestones[-1]
        assert last <= loaded.recipe.epochs - (5 if sweep.name != "demo_minibatch" else 1)
        assert resolved.schedule.lr((resolved.steps - 1) * resolved.batch.train) < float(resolved.schedule.peak_lr) / 50
        assert resolved.batch.micro == 32
    ranks = "1" if sweep.name == "demo_minibatch" else "2"
    assert cli.main(["sweep", str(path), "--dry-run", "--samples", str(images), "--world-size", ranks]) == 0
    assert capsys.readouterr().out.count("  missing\n") == len(runs)
    assert all(figure.arms for figure in sweep.figures())


@pytest.mark.parametrize("name", ["table1", "table2a", "table2b", "table2c", "figure1"])
def test_an_arm_is_the_papers_row_and_has_its_published_error(name):
    sweep = sweep_file.load(SWEEPS / f"{name}.yaml")
    assert sweep.sections.seeds == [0, 1, 2, 3, 4], "the paper's are of 5 runs"
    assert not sweep.sections.paper_task
    for run in sweep.runs(Path("runs")):
        row = file_of(run.arm.name)
        assert training(run.config, run.overrides) == training(SWEEPS.parent / "paper" / f"{row}.json"), run.name
        paper = run.arm.paper
        assert (None if paper is None else f"{paper.error:.2f} ± {paper.std:.2f}") == PUBLISHED[row], run.name
    assert "256" in sweep.baseline and "lr" not in sweep.baseline and "gamma" not in sweep.baseline


def test_every_row_of_the_paper_is_an_arm_of_a_sweep():
    arms = [arm.name for name in ("table1", "table2a", "table2b", "table2c", "figure1")
            for arm in sweep_file.load(SWEEPS / f"{name}.yaml").arms]  # fmt: skip
    assert {file_of(arm) for arm in arms} == PUBLISHED.keys()


@pytest.mark.parametrize("prefix", ["table|figure", "cifar10_(?!small)", "cifar10_small"])
def test_arms_of_one_name_are_one_training_so_that_sweeps_can_share_a_folder(prefix):
    known: dict[str, dict] = {}
    shared = 0
    for path in SHIPPED:
        if not re.match(prefix, path.stem):
            continue
        for run in sweep_file.load(path).runs(Path("runs")):
            ours = training(run.config, run.overrides)
            shared += run.name in known
            assert known.setdefault(run.name, ours) == ours, f"{path.stem}: {run.name}"
    assert shared >= 6


@pytest.mark.parametrize("name", CIFAR10)
def test_a_cifar10_arm_stands_beside_the_papers_of_the_same_ratio(name):
    sweep = sweep_file.load(SWEEPS / f"{name}.yaml")
    assert sweep.sections.paper_task and sweep.baseline == "kn-128"
    for run in sweep.runs(Path("runs")):
        loaded = config.load(run.config, run.overrides)
        paper = run.arm.paper
        assert paper is not None and loaded.blocks.train_batch_size is not None
        there = 256 * loaded.blocks.train_batch_size // loaded.recipe.reference_batch
        if name in ("cifar10_small_table1", "cifar10_small_table2a") and there > 256:
            there = 8192  # a fifth of the images: 4 times the reference beside the paper's 32 times, as the table says
            assert loaded.blocks.train_batch_size == 512 and "at 32 times the reference" in sweep.sections.paper_task
        assert f"kn = {short(there)}" in paper.source
        assert paper.minibatch in (None, there) and ("figure1" not in name or paper.minibatch == there)
        row = file_of(re.sub(r"kn-(128|512|4k)(?=-|$)", f"kn-{short(there)}", run.arm.name))
        row = f"kn_{short(there)}" if "figure1" in name else row
        assert f"{paper.error:.2f} ± {paper.std:.2f}" == PUBLISHED[row]
