"""benchmarks/gpu.py on a CPU: its own logic, and the smoke run that goes through every section."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_input  # noqa: E402
import gpu_machine  # noqa: E402
import gpu_profile  # noqa: E402
import gpu_report  # noqa: E402
import gpu_required  # noqa: E402
from gpu_points import BARE, ENGINE, SECTIONS, TIMM, Point, Settings  # noqa: E402
from gpu_profile import Piece  # noqa: E402

SETTINGS = Settings("/nowhere")
POINTS = [*SETTINGS.eager, *SETTINGS.compiled]


def timed(point: Point, bare: float = 100.0, engine: float = 100.0, timm: float = 50.0) -> dict:
    """A point's record; the machine is twice as fast in the second of its rounds."""
    rounds = [{BARE: bare * speed, ENGINE: engine * speed, TIMM: timm * speed} for speed in (1, 2, 1)]
    return {
        "section": "compiled" if point.compiled else "eager",
        "point": asdict(point),
        "rounds": rounds,
        "first": {BARE: 1.0, ENGINE: 1.0, TIMM: 1.0},
        "without": {},
        "peak_gigabytes": None,
    }


def fed(point: Point, loaded: float = 6000.0) -> dict:
    return {
        "section": "end-to-end",
        "what": "engine",
        "point": asdict(point),
        "threads": 8,
        "resident": [0.9 * loaded, 1.1 * loaded, 2.9 * loaded],
        "loaded": [loaded, 2 * loaded],
        "waited": [0.0, 0.0],
    }


def good_records() -> list[dict]:
    fast = [timed(point, engine=6000, bare=6000) for point in POINTS]
    return [*fast, *map(fed, SETTINGS.fed)]


def by_name(records: list[dict]) -> dict[str, gpu_required.Gate]:
    return {gate.required.name: gate for gate in gpu_required.gates(records, SETTINGS)}


def test_all_requirements_are_met_where_all_points_are_good():
    gates = by_name(good_records())
    assert set(gates) == {required.name for required in gpu_required.REQUIRED}
    assert all(gate.met and not gate.missing for gate in gates.values())
    # formed within a round: the rounds differ by a factor of two, the ratios do not
    assert set(gates[gpu_required.TO_BARE].values[POINTS[0]]) == {1.0}
    # each turn against the mean of those around it
    assert gates[gpu_required.TO_ENGINE].values[SETTINGS.fed[0]] == [1.0, 1.0]


def test_a_requirement_is_missed_where_one_point_is_below_its_bound():
    slow = Point("fp16", 32)
    records = [
        timed(slow, engine=97, bare=100) if Point(**record["point"]) == slow else record for record in good_records()
    ]
    gate = by_name(records)[gpu_required.TO_BARE]
    assert not gate.met and gate.failing == [slow]
    assert gate.lowest == (slow, pytest.approx(0.97))


def test_timm_is_compared_at_equal_batches_and_with_workers_in_turn():
    gates = by_name(good_records())
    assert {(point.n, point.groups) for point in gates[gpu_required.TO_TIMM].values} == {(256, 1)}
    assert {(point.n, point.groups) for point in gates[gpu_required.TO_TIMM_SMALL].values} == {(32, 8)}


def test_what_was_not_measured_is_not_met():
    records = [record for record in good_records() if Point(**record["point"]) != SETTINGS.fed[1]]
    gates = by_name(records)
    assert gates[gpu_required.TO_ENGINE].missing == [SETTINGS.fed[1]] and not gates[gpu_required.TO_ENGINE].met
    assert not any(gate.met for gate in by_name([]).values())


def test_a_contender_that_failed_leaves_the_others_ratios():
    point = POINTS[0]
    record = timed(point)
    for each in record["rounds"]:
        del each[TIMM]
    gates = by_name([{**record, "without": {TIMM: "OutOfMemoryError: of memory"}}])
    assert gates[gpu_required.TO_BARE].values == {point: [1.0, 1.0, 1.0]}
    assert point in gates[gpu_required.TO_TIMM].missing


def test_the_fastest_engine_on_loaded_batches_decides_and_one_slow_point_does_not():
    """What it does on images that lie on the device already is not what a training does."""
    one, other = SETTINGS.fed
    resident = [timed(point, engine=9000) for point in POINTS]
    gate = by_name([*resident, fed(one, 5000), fed(other, 10)])[gpu_required.BEST]
    assert gate.met and gate.lowest == (one, 7500)
    gate = by_name([*resident, fed(one, 3000)])[gpu_required.BEST]
    assert not gate.met and gate.failing == [one]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"section": "correctness", "what": "ghosts", "value": 2e-12, "most": 1e-12}, "ghosts"),
        ({"section": "correctness", "what": "ghosts", "value": math.nan, "most": 1e-12}, "ghosts"),
        ({"explicit": 1, "named": None, "raised": None, "timer": False}, "waits"),
        ({"explicit": 0, "named": {"adam.py:3": 2}, "raised": None, "timer": False}, "waits"),
        ({"explicit": 0, "named": {}, "raised": "adam.py:3: synchronizing", "timer": False}, "waits"),
        ({"explicit": 0, "named": {}, "raised": None, "timer": True}, "not counted"),
    ],
)
def test_what_is_not_as_promised_is_said(record, words):
    (said,) = gpu_required.broken([{"section": "synchronisations", "what": "eager", **record}])
    assert words in said


def test_what_is_as_promised_is_not():
    records = [
        {"section": "correctness", "what": "ghosts", "value": 1e-12, "most": 1e-12},
        {"section": "synchronisations", "what": "a", "explicit": 0, "named": {}, "raised": None, "timer": False},
        {"section": "synchronisations", "what": "b", "explicit": 6, "named": {}, "raised": None, "timer": True},
    ]
    assert gpu_required.broken(records) == []


def test_the_report_names_what_failed_and_what_was_not_reached(capsys):
    records = [
        timed(POINTS[0]),
        {"section": "eager", "point": asdict(POINTS[1]), "failed": "OutOfMemoryError: [GPU 0]"},
        {"section": "end-to-end", "failed": "cut off after 3 s"},
    ]
    gpu_report.print_report(records, SETTINGS, 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert any(f"{POINTS[1]} " in line and "FAILED OutOfMemoryError: [GPU 0]" in line for line in lines)
    assert any(f"{POINTS[2]} " in line and "not reached" in line for line in lines)
    assert not any(f"{POINTS[0]} " in line and "not reached" in line for line in lines)
    assert any("end-to-end" in line and "cut off after 3 s" in line for line in lines)
    assert any(gpu_required.TO_TIMM in line and "INCOMPLETE" in line for line in lines)


# ---------------------------------------------------------------- profiles, clocks, images


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "conv"),
        ("cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128>", "conv"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel<...>", "BN"),
        ("triton_red_fused__native_batch_norm_legit_functional_7", "BN"),
        ("triton_red_fused_var_mean_12", "BN"),
        ("triton_poi_fused_add_relu_3", "elementwise and reductions"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "copies"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgdMathFunctor>", "optimizer"),
        ("something_else_entirely", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert gpu_profile.kind(kernel) == kind


def test_the_shares_of_an_update():
    pieces = [
        Piece("nccl", 30, 60),  # beside the convolution
        Piece("conv", 20, 50),
        Piece("conv", 0, 10),
        Piece("Memcpy", 80, 100),
    ]
    shares = gpu_profile.shares(pieces)
    assert shares == pytest.approx({"conv": 0.4, "communication": 0.3, "copies": 0.2, "idle": 0.3})
    assert gpu_profile.most_expensive(pieces)[0] == ("conv", 40, 2)


def test_clocks_are_summed_up():
    text = (
        "1980, 512.40, 51, 0x0000000000000004\n1755, [N/A], 60, 0x0000000000000001\n\n1700, 5"  # killed while writing
    )
    seen = gpu_machine.summary(text)
    assert seen["clocks.sm"] == {"least": 1755, "median": 1867.5, "most": 1980}
    assert seen["power.draw"]["most"] == 512.4 and seen["temperature.gpu"]["most"] == 60
    assert seen["reasons"] == ["power cap"]
    assert gpu_machine.summary("Failed to initialize NVML\n") is None


def test_synthetic_images_have_the_usual_size(tmp_path):
    gpu_input.write_synthetic(tmp_path, 3, gpu_input.USUAL_SIDES)
    images = sorted(tmp_path.glob("*/*.jpg"))
    assert len(images) == 3 and len({path.read_bytes() for path in images}) == 3
    for path in images:
        assert path.stat().st_size == pytest.approx(gpu_input.USUAL_BYTES, rel=0.2)


# ---------------------------------------------------------------- running sections


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path / "results.jsonl")


def run_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: gpu.Results, code: str, seconds: float) -> None:
    child = tmp_path / "child.py"
    child.write_text(code)
    monkeypatch.setattr(gpu, "CHILD", child)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    gpu.Runner(Settings(str(tmp_path)), results, math.inf).run("eager", time.monotonic() + seconds)


def test_a_section_that_hangs_is_ended_with_all_its_processes_and_what_it_said_is_kept(tmp_path, monkeypatch, results):
    code = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('{"worker": %d}' % worker.pid, flush=True)
time.sleep(600)
"""
    run_child(tmp_path, monkeypatch, results, code, 3)
    said, failed = results.records
    assert said["section"] == "eager" and "cut off after 3 s" in failed["failed"]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == results.records
    until = time.monotonic() + 20
    while psutil.pid_exists(said["worker"]) and psutil.Process(said["worker"]).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the worker lives"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "words"),
    [("raise SystemExit(3)", "exit status 3"), ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV")],
)
def test_a_section_that_fails_is_a_result(tmp_path, monkeypatch, results, code, words):
    run_child(tmp_path, monkeypatch, results, code, 60)
    (record,) = results.records
    assert words in record["failed"] and results.failed() == ["eager"]
    assert Path(record["failed"].rpartition(": ")[2]).exists()


def test_a_section_without_time_is_not_begun(tmp_path, results):
    gpu.Runner(Settings(str(tmp_path)), results, time.monotonic() + 1).run("eager", math.inf)
    assert results.records == [{"section": "eager", "failed": "not begun: no time was left"}]


def test_sections_share_the_time_that_is_left(tmp_path, monkeypatch, results):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    limits = {}

    class Fake:
        def run(self, section: str, until: float) -> None:
            limits[section] = until - now[0]
            now[0] += 10 if section == "ceilings" else until - now[0]

    chosen = ["ceilings", "compiled", "end-to-end"]
    gpu.run_timed(Fake(), results, chosen, Settings(str(tmp_path)), 300.0)
    assert limits["ceilings"] == pytest.approx(300 * 15 / 235)
    assert limits["compiled"] == pytest.approx(290 * 105 / 220)  # what the one before did not need is there for all
    assert now[0] == pytest.approx(300)


# ---------------------------------------------------------------- the smoke run


def numbers(values: object) -> bool:
    return isinstance(values, list) and all(math.isfinite(value) and value > 0 for value in values) and bool(values)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_smoke_run_goes_through_every_section(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--smoke", "--work", tmp_path / "work", "--json", found]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*map(str, command), "--budget", "800"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=850,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads(found.read_text())
    settings, records = Settings(**content["settings"]), content["records"]
    assert {record["section"] for record in records} == {*SECTIONS, "profile"}
    assert not [record for record in records if "failed" in record or record.get("without")]

    steps = gpu_required.step_records(records)
    assert set(steps) == {*settings.eager, *settings.compiled}
    assert all(numbers(list(each.values())) for record in steps.values() for each in record["rounds"])
    assert len(steps[settings.eager[0]]["rounds"][0]) == 6  # the engine's options, too
    for gate in content["required"]:
        assert gate["values"] and not gate["missing"]
        assert all(numbers(values) for values in gate["values"].values())
    assert gpu_required.broken(records) == []
    exact = [record for record in records if str(record.get("what", "")).startswith("ghost batches / ")]
    assert [record["most"] for record in exact] == [1e-12, 1e-12]  # gradients and statistics, in float64

    waits = [record["explicit"] for record in records if record["section"] == "synchronisations"]
    assert waits == [0, 0, 0, 2 * 3]  # of DeepSpeed's timer: twice in each of three updates
    (data,) = (record for record in records if record["section"] == "data")
    assert data["images"] == settings.dataset
    alone = [record for record in records if record.get("what") == "loader alone"]
    assert alone and all(numbers(record["rates"]) for record in alone)
    (profile,) = (record for record in records if record["section"] == "profile")
    assert profile["shares"]["conv"] > 0 and "conv" in Path(profile["path"]).read_text()

    lines = run.stdout.splitlines()
    assert "SMOKE RUN" in lines[0]
    for section in ("compile", "correctness", "synchronisations", "ceilings", "eager", "compiled", "end-to-end"):
        assert any(line == section or line.startswith(f"{section}, ") for line in map(str.strip, lines)), section
    assert "not reached" not in run.stdout and "FAILED" not in run.stdout
    assert sum("not judged on a CPU" in line for line in lines) == len(gpu_required.REQUIRED)


def test_without_a_gpu_it_says_what_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--work", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120, check=False)
    assert run.returncode == 2 and "no CUDA device" in run.stderr and "--smoke" in run.stderr
    assert not list(tmp_path.iterdir())
