"""A sweep's report: its numbers against arithmetic by hand, what is missing, and its figures in the paper's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from pipeline import cli, config, sweep_file
from pipeline.metrics import MetricsWriter
from pipeline.report import figures
from pipeline.report.sweep import read, rows_of
from pipeline.sweep_state import ENDED, LOG_FILE
from tests.pipeline.report.conftest import Page, text_of

CONFIGS = Path(__file__).resolve().parents[3] / "ds_configs"
SWEEP: dict[str, Any] = {
    "title": "Table 1: warmup",
    "base": str(CONFIGS / "imagenet_256.json"),
    "seeds": [0, 1, 2],
    "baseline": "kn-256",
    "arms": [
        {
            "name": "none",
            "set": {"train_batch_size": 8192},
            "paper": {"error": 24.84, "std": 0.37, "source": "table 1"},
        },
        {"name": "kn-256", "paper": {"error": 23.6, "std": 0.12}},
        {"name": "kn-64", "set": {"train_batch_size": 64}},
    ],
    "figures": [{"kind": "minibatch", "title": "Figure 1"}, {"kind": "curves", "arms": ["none", "kn-64"]}],
}
# errors of the epochs' evaluations, by seed: the medians of the last five are 24.0, 24.6, 25.2 and 23.0, 23.2, 23.4
NONE = {seed: [90, 80, *(24.0 + 0.6 * seed + d for d in (-1, 0.5, 0, 1, -0.2))] for seed in range(3)}
BASELINE = {seed: [70, *(23.0 + 0.2 * seed + d for d in (0.1, -0.1, 0, 2, -2))] for seed in range(3)}


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Path]:
    """Writes the sweep's file, with sections changed."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "table1.yaml"
        path.write_text(json.dumps(SWEEP | changes))
        return path

    return write


def train(
    path: Path,
    arm: str,
    errors: dict[int, list[float]],
    *,
    finished: bool = True,
    diverged: bool = False,
    **other: Any,
) -> None:
    """The record of a run for each seed, with one evaluation per epoch, and training errors that are 1 point more.

    Where it diverged, that is a fifth of an epoch after the last.
    """
    for run in sweep_file.load(path).runs(path.parent / "runs"):
        if run.arm.name != arm or run.seed not in errors:
            continue
        loaded = config.load(run.config, run.overrides)
        kn = loaded.blocks.train_batch_size
        assert kn is not None
        run.folder.mkdir(parents=True)
        resolved = loaded.resolved() | {"train_batch_size": kn}
        (run.folder / "config.resolved.json").write_text(json.dumps(resolved | other))
        with MetricsWriter(run.folder / "metrics.jsonl") as record:
            record.write(
                "start", seed=run.seed, train_batch_size=kn, peak_lr=0.1 * kn / 256, epochs=7, train_samples=1000,
                val_samples=500, plan="the plan",
            )  # fmt: skip
            for epoch, error in enumerate(errors[run.seed], start=1):
                at = {"samples": 1000 * epoch, "epoch": epoch}
                record.write("epoch", **at, loss=1.0, top1=100 - error - 1)
                record.write("evaluation", **at, top1=100 - error, images=500)
            epochs = len(errors[run.seed]) + 0.2
            if diverged:
                record.write(
                    "diverged", step=9, samples=1000 * epochs, epoch=epochs, why=f"the loss is nan (epoch {epochs:.2f})"
                )
            elif finished:
                record.write("finished", samples=1000 * len(errors[run.seed]), seconds=60.0)


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert cli.main(["report", *map(str, words)]) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------- the table


@pytest.mark.usefixtures("no_pictures")
def test_the_numbers_are_those_of_arithmetic(sweep, tmp_path, capsys):
    path = sweep()
    train(path, "none", NONE)
    train(path, "kn-256", BASELINE)
    told = json.loads(answer(capsys, path, "--runs", tmp_path / "runs", "--json"))
    assert told["title"] == "Table 1: warmup"
    none, baseline, small = told["rows"]
    assert none["medians"] == pytest.approx([24.0, 24.6, 25.2])
    assert (none["top1_error"], none["std"]) == (pytest.approx(24.6), pytest.approx(0.6))
    assert baseline["medians"] == pytest.approx([23.0, 23.2, 23.4])
    assert (baseline["top1_error"], baseline["std"]) == (pytest.approx(23.2), pytest.approx(0.2))
    assert none["difference"] == pytest.approx(1.4) and baseline["difference"] is None
    assert none["ours_minus_paper"] == pytest.approx(-0.24) and baseline["ours_minus_paper"] == pytest.approx(-0.4)
    assert none["paper"]["difference"] == pytest.approx(1.24) and baseline["paper"]["difference"] is None
    assert (small["top1_error"], small["paper"], small["difference"]) == (None, None, None)
    assert small["remarks"] == ["kn-64: seed-0, seed-1, seed-2 have not been trained."]
    assert none["remarks"] == baseline["remarks"] == []


@pytest.mark.usefixtures("no_pictures")
def test_the_markdown_table(sweep, tmp_path, capsys):
    path = sweep()
    train(path, "none", NONE)
    train(path, "kn-256", BASELINE)
    lines = answer(capsys, path, "--runs", tmp_path / "runs", "--markdown").splitlines()
    assert lines[0] == "**Table 1: warmup**"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:7]]
    assert cells[0][:5] == ["arm", "minibatch<br>kn, images", "learning<br>rate, peak", "seeds", "top-1 error<br>%"]
    assert cells[0][5:9] == [
        "difference<br>points of error",
        "the paper<br>error, %",
        "difference<br>in the paper",
        "ours − paper<br>points of error",
    ]
    # Welch: t(0.975; 2 degrees of freedom) = 4.303, √(0.36 / 3 + 0.04 / 3) = 0.3651
    assert cells[2][:9] == [
        "none", "8,192", "3.2", "0–2", "24.60 ± 0.60", "+1.40 (−0.17 … +2.97)", "24.84 ± 0.37", "+1.24", "−0.24",
    ]  # fmt: skip
    assert cells[3][:9] == [
        "kn-256", "256", "0.1", "0–2", "23.20 ± 0.20", "baseline", "23.60 ± 0.12", "baseline", "−0.40",
    ]  # fmt: skip
    assert cells[4][:9] == ["kn-64 (not trained)", *("–" for _ in range(8))]
    assert lines[-1] == "- kn-64: seed-0, seed-1, seed-2 have not been trained."
    assert {line.count("|") for line in lines[2:7]} == {len(cells[0]) + 1}


@pytest.mark.usefixtures("no_pictures")
def test_figures_of_another_task_are_not_subtracted(sweep, tmp_path, capsys):
    path = sweep(paper_task="ResNet-50 on ImageNet")
    train(path, "none", NONE)
    train(path, "kn-256", BASELINE)
    told = json.loads(answer(capsys, path, "--runs", tmp_path / "runs", "--json"))
    assert [row["ours_minus_paper"] for row in told["rows"]] == [None] * 3
    assert told["rows"][0]["paper"]["difference"] == pytest.approx(1.24), "differences can be compared"
    table = answer(capsys, path, "--runs", tmp_path / "runs", "--markdown")
    assert "ours − paper" not in table and "+1.24" in table
    page = text_of(tmp_path / "runs" / "report.html")
    assert "figures are of ResNet-50 on ImageNet, and not of what was trained here" in page
    assert "In the paper, ResNet-50 on ImageNet: 24.84 ± 0.37 %, 1.24 points above its baseline." in page


@pytest.mark.usefixtures("no_pictures")
def test_what_is_missing_unfinished_failed_or_of_another_training_is_named(sweep, tmp_path, capsys):
    path = sweep()
    train(path, "none", {0: NONE[0]})
    train(path, "none", {1: NONE[1][:3]}, finished=False)
    train(path, "kn-256", BASELINE, fp16={"enabled": False})
    with MetricsWriter(tmp_path / "runs" / LOG_FILE) as record:
        record.write(ENDED, run="none/seed-0", how="failed", code=1, last=["of an earlier try"])
        record.write(ENDED, run="none/seed-2", how="failed", code=1, last=["of an earlier try"])
        record.write(ENDED, run="none/seed-2", how="failed", code=2, last=["x", "  it diverged"])
    rows, sizes = rows_of(sweep_file.load(path), tmp_path / "runs")
    assert sizes == {"none": 8192, "kn-256": 256, "kn-64": 64}
    none, baseline, _ = rows
    assert none.error == pytest.approx(24.0) and none.std is None, "of the finished run alone"
    assert none.notes == ("none/seed-2 failed with exit code 2. “it diverged”",)
    different = "is not what the sweep asks for: fp16.enabled is false, not true."
    assert baseline.notes == tuple(f"kn-256/seed-{seed} {different}" for seed in range(3))
    out = answer(capsys, path, "--runs", tmp_path / "runs")
    assert "none/seed-1 has not finished (epoch 3 of 7) and is left out of the figures." in out
    assert "kn-64 (not trained)" in out and "kn-64: no answer yet, because kn-64 has not been trained." in out
    (tmp_path / "runs/none/seed-0/metrics.jsonl").write_text("broken\n\n")
    (tmp_path / "runs/kn-256/seed-0/config.resolved.json").unlink()
    out = answer(capsys, path, "--runs", tmp_path / "runs")
    assert "not a line of a run's record" in out and "config.resolved.json: there is no such configuration file" in out


@pytest.mark.usefixtures("no_pictures")
def test_an_arm_of_which_a_seed_diverged_has_no_error_and_names_the_survivors_as_such(sweep, tmp_path, capsys):
    path = sweep()
    train(path, "none", {0: NONE[0]})
    train(path, "none", {1: NONE[1][:3], 2: NONE[2][:1]}, diverged=True)
    train(path, "kn-256", BASELINE)
    train(path, "kn-64", {0: NONE[0][:3], 1: NONE[1][:2]}, diverged=True)
    with MetricsWriter(tmp_path / "runs" / LOG_FILE) as record:  # as a sweep took it before records told of it
        record.write(ENDED, run="none/seed-1", how="failed", code=2, last=["x"])
    none, _, small = json.loads(answer(capsys, path, "--runs", tmp_path / "runs", "--json"))["rows"]
    for row in (none, small):
        unknown = ("top1_error", "top1_accuracy", "std", "difference", "difference_95", "ours_minus_paper")
        assert {key: row[key] for key in unknown} == dict.fromkeys(unknown)
        assert row["medians"] == row["evaluations_used"] == [] and row["finished"] is False
    assert none["diverged"] == {"none/seed-1": 3.2, "none/seed-2": 1.2}
    assert none["survivors"] == {"runs": ["none/seed-0"], "error": pytest.approx(24.0), "std": None}
    assert none["seeds"] == [0, 1, 2]
    assert small["diverged"] == {"kn-64/seed-0": 3.2, "kn-64/seed-1": 2.2} and small["survivors"] is None
    assert none["remarks"][:2] == [
        "none/seed-1 diverged: the loss is nan (epoch 3.20).",
        "none/seed-2 diverged: the loss is nan (epoch 1.20).",
    ]
    assert not any("failed" in remark or "has not finished" in remark for remark in none["remarks"])
    assert small["remarks"][-1] == "kn-64: seed-2 has not been trained."

    table = answer(capsys, path, "--runs", tmp_path / "runs", "--markdown")
    assert (
        "| none | 8,192 | 3.2 | 0–2 | diverges (2 of 3 seeds) (the others: 24.00) | – | 24.84 ± 0.37 | +1.24 | – |"
        in table
    )
    assert "| kn-64 | 64 | 0.025 | 0, 1 | diverges (2 of 2 seeds) | – |" in table
    out = answer(capsys, path, "--runs", tmp_path / "runs")
    said = "none: diverges (2 of 3 seeds), at epoch 3.20, 1.20. The one that finished has error 24.00 %, which is not"
    assert said in out and "kn-64: diverges (2 of 2 seeds), at epoch 3.20, 2.20.\n" in out
    page = text_of(tmp_path / "runs" / "report.html")
    assert said in page and "diverges (2 of 3 seeds) the others: 24.00" in page
    assert "none/seed-2 · diverged" in page and "unfinished" not in page


@pytest.mark.usefixtures("no_pictures")
def test_nothing_is_compared_with_a_baseline_that_diverged(sweep, tmp_path, capsys):
    path = sweep(seeds=[0])
    train(path, "none", {0: NONE[0]})
    train(path, "kn-256", {0: BASELINE[0][:2]}, diverged=True)
    out = answer(capsys, path, "--runs", tmp_path / "runs")
    assert "none: no answer, because kn-256 diverges." in out
    none, baseline, _ = json.loads(answer(capsys, path, "--runs", tmp_path / "runs", "--json"))["rows"]
    assert none["difference"] is None and none["top1_error"] == pytest.approx(24.0)
    assert baseline["seconds"] is None and baseline["diverged"] == {"kn-256/seed-0": 2.2}


@pytest.mark.usefixtures("no_pictures")
def test_an_arm_of_which_a_seed_diverged_while_another_goes_on_is_unfinished(sweep, tmp_path):
    path = sweep()
    train(path, "none", {0: NONE[0][:3]}, diverged=True)
    train(path, "none", {1: NONE[1][:4]}, finished=False)
    with MetricsWriter(tmp_path / "runs" / LOG_FILE) as record:
        for run in ("none/seed-0", "none/seed-1"):
            record.write(ENDED, run=run, how="failed", code=2, last=["x"])
    none = rows_of(sweep_file.load(path), tmp_path / "runs")[0][0]
    assert none.notes == ("none/seed-1 failed with exit code 2. “x”", "none: seed-2 has not been trained.")
    assert (none.state, none.error, none.survivors) == ("unfinished", None, None)
    assert list(none.diverged) == ["none/seed-0"] and list(none.counted) == ["none/seed-1"]


def test_the_page_has_the_title_the_figures_and_the_runs(sweep, tmp_path, capsys):
    path = sweep()
    train(path, "none", NONE)
    train(path, "kn-256", BASELINE)
    out = answer(capsys, path, "--runs", tmp_path / "runs", "--out", tmp_path / "there")
    assert out.startswith("Table 1: warmup\n") and out.rstrip().endswith("there/report.html")
    page = Page(tmp_path / "there" / "report.html")
    text = " ".join(" ".join(page.text).split())
    assert page.open == [] and all(source.startswith("data:image/png") for source in page.fetched)
    order = [
        "Table 1: warmup",
        "none: error 24.60 ± 0.60 %, 1.40 points above kn-256 (23.20 ± 0.20 %). In the paper: 24.84 ± 0.37 %, 1.24",
        "24.60 ± 0.60",
        "table 1",
        "not trained",
        "bars are ± 2 standard deviations",
        "Training error, measured on the minibatches",
        "the plan",
    ]
    positions = []
    for part in order:
        positions.append(text.index(part, positions[-1] if positions else 0))
    assert (tmp_path / "there" / "figure-1.png").stat().st_size > 3_000
    assert (tmp_path / "there" / "figure-2.png").stat().st_size > 3_000


def test_a_sweep_of_which_nothing_was_trained_makes_a_page_too(sweep, tmp_path, capsys):
    path = sweep()
    (tmp_path / "runs").mkdir()
    assert "not trained" in answer(capsys, path, "--runs", tmp_path / "runs")


def test_mistakes(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = sweep()
    for words, expected in (
        ([path], "runs/table1: there are no runs of"),
        ([path, tmp_path], "a sweep is reported on by itself"),
        ([path, "--reference", tmp_path], "a sweep is reported on by itself"),
        ([tmp_path, "--runs", tmp_path], "--runs says where the runs of a sweep are"),
        (["nothing.yaml"], "there is no such sweep file"),
    ):
        assert cli.main(["report", *map(str, words)]) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "run.yaml").mkdir()  # a run folder may be called so
    assert cli.main(["report", "run.yaml"]) == 2
    assert "no metrics.jsonl in it" in capsys.readouterr().err


# ---------------------------------------------------------------- the figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as matplotlib has them, instead of as pictures."""
    made: list[Figure] = []

    def keep(fill: Callable[[Figure], None], height: float) -> bytes:
        made.append(Figure())
        fill(made[-1])
        return b""

    monkeypatch.setattr(figures, "as_png", keep)
    return made


def band(collection: PolyCollection) -> np.ndarray:
    """Lower and upper edge of a band at its epochs."""
    vertices = collection.get_paths()[0].vertices
    return np.array([[vertices[vertices[:, 0] == x][:, 1].min(), vertices[vertices[:, 0] == x][:, 1].max()]
                     for x in np.unique(vertices[:, 0])])  # fmt: skip


def test_curves_show_the_baseline_and_one_arm_in_each_panel(sweep, tmp_path, drawn):
    path = sweep(figures=[{"kind": "curves"}, {"kind": "curves", "arms": ["none"], "validation": True}])
    train(path, "none", NONE)
    train(path, "kn-256", BASELINE)
    read(path, tmp_path / "runs")
    both, small = drawn[0].axes
    assert [axes.get_title(loc="left") or axes.get_title() for axes in (both, small)] == ["none", "kn-64"]
    baseline, none = both.get_lines()
    trained = np.array(list(NONE.values())) + 1
    np.testing.assert_allclose(none.get_xydata(), np.stack([np.arange(1, 8), trained.mean(0)], 1))
    std = trained.std(0, ddof=1)
    edges = np.stack([trained.mean(0) - std, trained.mean(0) + std], 1)
    np.testing.assert_allclose(band(both.collections[1]), edges)
    np.testing.assert_allclose(baseline.get_ydata(), np.array(list(BASELINE.values())).mean(0) + 1)
    assert baseline.get_color() != none.get_color() == "#0072B2", "an arm has the colour of its row"
    legend = [text.get_text() for text in both.get_legend().get_texts()]
    assert legend == ["kn = 256, η = 0.1   23.20 ± 0.20 %", "kn = 8k, η = 3.2   24.60 ± 0.60 %"]
    assert len(small.get_lines()) == 1, "nothing of kn-64 is there yet"
    (axes,) = drawn[1].axes
    assert [line.get_linestyle() for line in axes.get_lines()] == ["-", ":", "-", ":"]
    np.testing.assert_allclose(axes.get_lines()[3].get_ydata(), trained.mean(0) - 1)


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_legends_give_no_error_of_what_has_not_finished_or_diverged(sweep, tmp_path, drawn):
    path = sweep(figures=[{"kind": "curves", "validation": True}])
    train(path, "none", {0: NONE[0]})
    train(path, "none", {1: NONE[1][:4], 2: NONE[2][:3]}, diverged=True)
    train(path, "kn-256", BASELINE)
    train(path, "kn-64", {0: NONE[0][:4]}, finished=False)
    read(path, tmp_path / "runs")
    diverging, unfinished = drawn[0].axes
    assert legend_of(diverging) == ["kn = 256, η = 0.1   23.20 ± 0.20 %", "kn = 8k, η = 3.2   diverges (2 of 3 seeds)"]
    assert legend_of(unfinished)[1] == "kn = 64, η = 0.025   (unfinished)"
    # the baseline's two, then the survivor and each that diverged: training error, and validation error
    lengths = [len(line.get_xdata()) for line in diverging.get_lines()]
    assert lengths == [6, 6, 7, 4, 3, 7, 4, 3]


def test_the_curves_of_an_arm_that_diverged_with_all_seeds_are_there_and_named_once(sweep, tmp_path, drawn):
    path = sweep(figures=[{"kind": "curves", "arms": ["none"]}])
    train(path, "none", {0: NONE[0][:5], 1: NONE[1][:4]}, diverged=True)
    read(path, tmp_path / "runs")
    (axes,) = drawn[0].axes
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [5, 4]
    assert legend_of(axes) == ["kn = 8k, η = 3.2   diverges (2 of 2 seeds)"]


def test_the_minibatch_figure_has_finished_arms_alone_and_a_cross_where_an_arm_diverged(sweep, tmp_path, drawn):
    path = sweep(figures=[{"kind": "minibatch"}])
    train(path, "none", {0: NONE[0]})
    train(path, "none", {1: NONE[1][:4]}, diverged=True)
    train(path, "kn-256", BASELINE)
    train(path, "kn-64", {0: NONE[0]}, finished=False)
    picture = read(path, tmp_path / "runs").figures[0]
    (axes,) = drawn[0].axes
    ours, papers = (container.lines[0].get_xydata() for container in axes.containers)
    np.testing.assert_allclose(ours, [[256, 23.2]])
    assert len(papers) == 2
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    edge = axes.transAxes.transform((0, 1))[1]
    shown = cross.get_transform().transform(cross.get_xydata())
    np.testing.assert_allclose(shown, [[axes.transData.transform((8192, 30))[0], edge]])
    assert [text.get_text() for text in axes.texts] == ["1 of 2"] and "diverges" in legend_of(axes)
    assert axes.get_ylim()[1] < 30, "a cross does not move the errors' axis"
    assert "Crosses at the upper edge" in picture.caption
    assert sorted(axes.get_xticks()) == [256, 8192]


def test_a_minibatch_figure_of_which_every_arm_diverged(sweep, tmp_path, drawn):
    path = sweep(figures=[{"kind": "minibatch"}], paper_task="another net")
    train(path, "none", {0: NONE[0][:2]}, diverged=True)
    read(path, tmp_path / "runs")
    left, _ = drawn[0].axes
    assert left.get_ylim() == (0, 100) and [text.get_text() for text in left.texts] == ["1 of 1"]
    assert list(left.get_xticks()) == [8192]


def bars(axes: Any) -> list[np.ndarray]:
    return [np.ptp(np.array(lines.get_segments())[:, :, 1], axis=1) for lines in axes.collections
            if isinstance(lines, LineCollection)]  # fmt: skip


def test_error_against_minibatch_is_on_a_log_axis_with_two_sigma_and_the_papers_points_beside(sweep, tmp_path, drawn):
    path = sweep(figures=[{"kind": "minibatch"}])
    train(path, "none", NONE)
    train(path, "kn-256", BASELINE)
    read(path, tmp_path / "runs")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
    ours, papers = (container.lines[0].get_xydata() for container in axes.containers)
    np.testing.assert_allclose(ours, [[256, 23.2], [8192, 24.6]])
    np.testing.assert_allclose(papers[:, 1], [23.6, 24.84])
    np.testing.assert_allclose(papers[:, 0], [256, 8192], rtol=0.1)
    assert (papers[:, 0] > ours[:, 0]).all(), "bars do not hide each other"
    np.testing.assert_allclose(bars(axes)[0], [4 * 0.2, 4 * 0.6])
    np.testing.assert_allclose(bars(axes)[1], [4 * 0.12, 4 * 0.37])
    ticks = [axes.xaxis.get_major_formatter()(tick, 0) for tick in axes.get_xticks()]
    assert ticks == ["256", "8k"]


def test_published_points_of_another_task_have_axes_of_their_own_at_their_own_minibatch(sweep, tmp_path, drawn):
    arms = [dict(arm) for arm in SWEEP["arms"]]
    arms[1] = arms[1] | {"paper": {"error": 23.6, "std": 0.12, "minibatch": 1024}}
    path = sweep(figures=[{"kind": "minibatch"}], arms=arms, paper_task="another net")
    train(path, "kn-256", {0: BASELINE[0]})
    read(path, tmp_path / "runs")
    left, right = drawn[0].axes
    np.testing.assert_allclose(left.containers[0].lines[0].get_xydata(), [[256, 23.0]])
    np.testing.assert_allclose(right.containers[0].lines[0].get_xydata(), [[1024, 23.6], [8192, 24.84]])
    np.testing.assert_allclose(bars(left)[0], [0])
    assert "another net" in right.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize(("kn", "text"), [(64, "64"), (1000, "1000"), (1024, "1k"), (65536, "64k"), (1536, "1536")])
def test_minibatches_are_written_as_in_the_paper(kn, text):
    assert figures.short(kn) == text
