"""`onehour plan --scaling`: its numbers are the model's, and what cannot be predicted from is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, scaling_page
from pipeline.cli import main
from pipeline.metrics import MetricsWriter
from pipeline.scaling import all_reduce_seconds, straggler_seconds
from pipeline.scaling_paper import CLUSTER, FITTED, GBIT

ROOT = Path(__file__).resolve().parents[2]
CONFIG_8K = ROOT / "ds_configs" / "imagenet_8k.json"
PLAN = ["plan", str(CONFIG_8K), "--samples", "1281167", "--world-size", "8"]
STEP = ["--scaling", "--step-seconds", "0.2", "--link-gbit", "40"]


def answer(capsys: pytest.CaptureFixture, *arguments: str | Path) -> dict[str, Any]:
    assert main([*PLAN, *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture, *arguments: str | Path) -> str:
    assert main([*PLAN, *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def record(folder: Path, *, ranks: int = 2, reports: int = 5, **fields: Any) -> Path:
    """A run's record: 4 micro-batches an update, of which compute has 80 % of 1, 2, 3, … seconds."""
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        facts = {"model": "resnet50", "micro_batch": 32, "precision": "float16", "accumulation": 4}
        writer.write("start", **{**facts, "world_size": ranks, "resumed_from": None, **fields})
        for number in range(reports):
            writer.write(
                "train",
                samples=256 * (number + 1),
                epoch=0.1,
                step_seconds=100.0 if number == 0 else float(number),
                data_wait=0.05,
                **({} if fields.get("old") else {"compute": 0.8, "communication": 0.15}),
            )
    return folder


@pytest.fixture
def rows(capsys: pytest.CaptureFixture) -> dict[int, dict[str, Any]]:
    found = answer(capsys, *STEP, "--straggler-ms", "4", "--no-overlap", "--local-gbit", "80000")
    return {row["world_size"]: row for row in found["predictions"]}


def test_the_numbers_are_the_models(rows):
    assert list(rows) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    first, last = rows[1], rows[256]
    assert (first["seconds"], first["accumulation"]) == (pytest.approx(256 * 0.2), 256)
    exposed = all_reduce_seconds(102_228_128, 32, CLUSTER.link, "halving-doubling")
    exposed += 2 * 31 / 32 * 102_228_128 * (1 / (40 * GBIT) - 1 / CLUSTER.link.bandwidth)
    exposed += 2 * (102_228_128 / (80_000 * GBIT) + 7 * 5e-6)
    assert last["communication_exposed"] == pytest.approx(exposed)
    assert last["communication_hidden"] == pytest.approx(0)
    assert last["seconds"] == pytest.approx(0.2 + exposed + straggler_seconds(4e-3, 256))
    assert last["efficiency"] == pytest.approx(0.2 / last["seconds"])
    assert last["images_per_second"] == pytest.approx(8192 / last["seconds"])
    assert last["training_seconds"] == pytest.approx(90 * 1_281_167 * last["seconds"] / 8192)


def test_overlap_hides_what_is_exposed_without_it(capsys, rows):
    found = answer(capsys, *STEP, "--straggler-ms", "4", "--local-gbit", "80000")
    last = found["predictions"][-1]
    assert found["backward_seconds"] == pytest.approx(0.2 * 0.6634, rel=1e-3)
    assert last["communication_exposed"] < rows[256]["communication_exposed"] / 5
    assert last["communication_hidden"] > 0.5 * rows[256]["communication_exposed"]


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        (["--no-overlap"], "sent after backward (--no-overlap)"),
        (["--set", "recipe.step.overlap=false"], "sent after backward (DeepSpeed averages them)"),
        (["--set", "recipe.step.compile=true"], "sent after backward, which is compiled"),
    ],
)
def test_gradients_are_sent_as_the_configuration_has_it(capsys, changes, sent):
    found = answer(capsys, *STEP, "--local-gbit", "80000", *changes)
    last = found["predictions"][-1]
    assert found["sent"] == sent
    assert last["communication_hidden"] == pytest.approx(0)
    assert last["communication_exposed"] > 0.02


def test_a_pass_of_several_workers_hides_more(capsys):
    slow = ["--scaling", "--step-seconds", "0.02", "--link-gbit", "40", "--up-to", "32"]
    one, eight = (
        answer(capsys, *slow, "--set", f"recipe.step.ghost_batches={workers}")["predictions"][-1] for workers in (1, 8)
    )
    assert one["compute"] == eight["compute"] == pytest.approx(8 * 0.02)
    assert eight["communication_exposed"] < one["communication_exposed"] / 2


def test_the_paper_stands_beside_it_within_5_percent_and_says_what_is_fitted(capsys):
    paper = answer(capsys, *STEP)["paper"]
    assert paper["fitted"] == FITTED and set(FITTED) == {"bandwidth between servers", "straggler σ"}
    assert [point["gpus"] for point in paper["points"]] == [8, 256, 352, 352]
    for point in paper["points"]:
        for figure in ("seconds", "images_per_second"):
            assert point[figure]["predicted"] == pytest.approx(point[figure]["published"], rel=0.05)
        ratio = point["seconds"]["predicted"] / point["seconds"]["published"]
        assert point["deviation"] == pytest.approx(ratio - 1, abs=1e-9)
    assert paper["efficiency_256"]["predicted"] == pytest.approx(0.9, rel=0.05)
    assert paper["other_fit"]["largest_deviation"] < 0.05
    assert abs(paper["without_fit"][-1]["deviation"]) > 0.1


def test_the_page_fits_a_screen_and_names_fit_and_assumptions(capsys):
    assert main([*PLAN, *STEP]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert "fitted     bandwidth between servers 15 Gbit/s · straggler σ 9 ms" in text
    assert "no test of the model" in text
    figures = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split("```")
    (table,) = (block.strip() for block in figures if block.strip().startswith("GPUs"))
    assert table in text
    assert "halving-doubling at 40 Gbit/s per host, 50 µs (assumed)" in text
    assert "8 ranks per host (assumed), 80 Gbit/s (assumed)" in text
    assert re.search(r"^ +256 +1 +8,192 .* %", text, re.MULTILINE)
    assert main([*PLAN, *STEP, "--latency-us", "5", "--ranks-per-host", "4", "--straggler-ms", "1"]) == 0
    text = capsys.readouterr().out
    assert "per host, 5 µs · 4 ranks per host, 80 Gbit/s (assumed)" in text
    assert "straggler" in next(line for line in text.splitlines() if line.startswith("ranks"))


def test_hosts_of_a_hostfile_say_how_many_ranks_they_have(capsys, tmp_path):
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\n")
    arguments = ["plan", str(CONFIG_8K), "--samples", "1281167", "--hostfile", str(tmp_path / "hosts"), "--json"]
    assert main([*arguments, *STEP]) == 0
    cluster = json.loads(capsys.readouterr().out)["cluster"]
    assert cluster["ranks_per_host"] == 4 and "ranks_per_host" not in cluster["assumed"]


@pytest.mark.parametrize(
    ("changes", "up_to", "ranks_per_host", "expected"),
    [
        ([], None, 8, [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        ([], 32, 8, [1, 2, 4, 8, 16, 32]),
        (["train_batch_size=3072"], None, 8, [1, 2, 4, 8, 16, 32, 96]),
        (["train_batch_size=3072"], None, 6, [1, 2, 4, 6, 12, 24, 48, 96]),
        (["train_batch_size=480"], None, 8, [1, 3, 15]),
        (["train_batch_size=null", "gradient_accumulation_steps=2"], None, 8, [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        (["train_batch_size=null", "gradient_accumulation_steps=2"], 352, 8, [1, 2, 4, 8, 16, 32, 64, 128, 256, 352]),
    ],
)
def test_which_ranks_are_shown(changes, up_to, ranks_per_host, expected):
    batches = scaling_page.world_sizes(config.load(CONFIG_8K, changes), up_to, ranks_per_host)
    assert [batch.world_size for batch in batches] == expected
    grows = any("accumulation" in change for change in changes)
    assert all(batch.accumulation == 2 for batch in batches) if grows else len({b.train for b in batches}) == 1


# ---------------------------------------------------------------- from a run


def test_the_step_is_the_median_of_a_runs_compute_after_its_first_report(capsys, tmp_path):
    found = answer(capsys, "--scaling", "--link-gbit", "40", "--from", record(tmp_path / "run"))
    assert found["step_seconds"] == pytest.approx(2.5 * 0.8 / 4)  # of 1, 2, 3, 4 seconds
    assert found["measured"] == f"{tmp_path / 'run'}, 2 ranks, median of 4 reports"


def test_a_resumed_run_counts_from_where_its_last_process_began(capsys, tmp_path):
    found = answer(
        capsys, "--scaling", "--link-gbit", "40", "--from", record(tmp_path / "run", reports=6, resumed_from=512)
    )
    assert found["step_seconds"] == pytest.approx(4 * 0.8 / 4)  # of 3, 4, 5: the first two are another process's


def test_an_old_run_of_one_rank_will_do_as_it_waited_for_nobody(capsys, tmp_path):
    found = answer(capsys, "--scaling", "--link-gbit", "40", "--from", record(tmp_path / "run", ranks=1, old=True))
    assert found["step_seconds"] == pytest.approx(2.5 * 0.95 / 4)


def resolved_by(folder: Path, *changes: str) -> Path:
    """Beside a run's record, the configuration that it was of."""
    (folder / config.RESOLVED_FILE).write_text(json.dumps(config.load(CONFIG_8K, changes).resolved()))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], []),
        (["recipe.seed=3", "recipe.epochs=1", "train_batch_size=32", "optimizer.params.lr=0.2"], []),
        (["recipe.transform.size=160"], ["recipe.transform.size is 160, not 224"]),
        (
            ["recipe.step.compile=true", "recipe.step.ghost_batches=4"],
            ["recipe.step.compile is true, not false", "recipe.step.ghost_batches is 4, not auto"],
        ),
        (['recipe.model.freeze=["layer1.*"]'], ['recipe.model.freeze is ["layer1.*"], not []']),
    ],
)
def test_what_may_have_cost_another_time_in_the_run_is_said(capsys, tmp_path, changes, said):
    run = resolved_by(record(tmp_path / "run", device="2 × NVIDIA H100"), *changes)
    arguments = ["--scaling", "--link-gbit", "40", "--from", str(run)]
    found = answer(capsys, *arguments)
    assert found["warnings"] == said
    assert found["measured"] == f"{run}, 2 ranks on NVIDIA H100, median of 4 reports"
    assert main([*PLAN, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if "recipe." in line] == said
    assert sum("warning" in line for line in lines) == bool(said)


def test_a_run_without_its_configuration_is_not_taken_for_granted(capsys, tmp_path):
    (said,) = answer(capsys, "--scaling", "--link-gbit", "40", "--from", record(tmp_path / "run"))["warnings"]
    assert said.startswith(f"there is no config.resolved.json in {tmp_path / 'run'}: its model, transform")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "resnet18"}, "its model was resnet18, the configuration's is resnet50"),
        ({"micro_batch": 64}, "its micro_batch was 64, the configuration's is 32"),
        ({"precision": "fp32"}, "its precision was fp32, the configuration's is float16"),
        ({"reports": 1}, "has no report after its first"),
        ({"old": True}, "does not say how much of its time was communication"),
    ],
)
def test_a_run_that_cannot_be_predicted_from_is_refused(capsys, tmp_path, fields, expected):
    message = refused(capsys, "--scaling", "--link-gbit", "40", "--from", record(tmp_path / "run", **fields))
    assert expected in message and "--ranks 1" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--step-seconds", "1"], "--step-seconds belongs to --scaling"),
        (["--no-overlap"], "--no-overlap belongs to --scaling"),
        (["--from", "x"], "--from belongs to --scaling"),
        (["--scaling", "--step-seconds", "1"], "--link-gbit G"),
        (["--scaling", "--link-gbit", "40"], "--step-seconds S or --from RUN"),
        ([*STEP, "--from", "x"], "--step-seconds S or --from RUN"),
        (["--scaling", "--link-gbit", "40", "--from", "no-such-run"], "no-such-run: no such run folder"),
        ([*STEP, "--link-gbit", "0"], "--link-gbit 0: a number greater than 0"),
        ([*STEP, "--step-seconds", "nan"], "--step-seconds nan"),
        ([*STEP, "--latency-us", "-1"], "--latency-us -1: a number of at least 0"),
        ([*STEP, "--straggler-ms", "inf"], "--straggler-ms inf"),
        ([*STEP, "--ranks-per-host", "0"], "--ranks-per-host 0"),
        ([*STEP, "--up-to", "0"], "--up-to 0"),
        ([*STEP, "--up-to", "24"], "cannot be split over 24 ranks"),
        ([*STEP, "--set", "train_micro_batch_size_per_gpu=null"], "train_micro_batch_size_per_gpu is not given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message(capsys, arguments, expected):
    assert expected in refused(capsys, *arguments)


def test_a_mistake_is_found_without_torch():
    code = "import sys; from pipeline.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *PLAN, *STEP, "--up-to", "24"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
