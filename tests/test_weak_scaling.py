"""benchmarks/weak_scaling.py: its figures from turns that are given, and real ranks that take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import weak_scaling  # noqa: E402
from weak_scaling_ranks import Turn  # noqa: E402


def turn(rate: float, others: float = 0.01) -> Turn:
    return Turn(rate, 64 / rate, {"compute": 0.5, "communication": 0.25, "data_wait": 0.125}, others)


def one_round(one: float, control: float, two: float, others: float = 0.01) -> dict[str, Turn]:
    return {"one": turn(one), "control": turn(control, others), "two": turn(two)}


def test_efficiencies_are_medians_over_rounds_of_ratios_within_a_round(capsys):
    # the machine is twice as fast in the second round: ratios of medians would differ
    weak_scaling.show([one_round(10, 19, 18), one_round(20, 36, 34), one_round(10, 18, 16)])
    text = " ".join(capsys.readouterr().out.split())
    assert "2 × 1 rank, the control 19.00 3.368 0.500 0.250 0.125 0.900 0.900 – 0.950" in text
    assert "2 ranks 18.00 3.556 0.500 0.250 0.125 0.850 0.800 – 0.900" in text
    assert "efficiency 0.850 = 0.900 that the machine shares × 0.944 that the ranks exchange" in text
    assert "other processes took 1.0% of both cores, at most 1.0%" in text


def test_a_round_is_quiet_where_all_of_its_turns_are():
    assert weak_scaling.quiet(one_round(10, 19, 18))
    assert not weak_scaling.quiet(one_round(10, 19, 18, others=0.2))


def test_a_round_that_has_ended_is_a_line():
    disturbed, quiet = one_round(10, 19, 10, others=0.2), one_round(10, 19, 18)
    assert weak_scaling.progress([], 3) == "warmed up"
    said = weak_scaling.progress([disturbed], 3)
    assert said == "round 1 of at most 9, disturbed · 0 of 3 quiet ones · efficiency so far –"
    said = weak_scaling.progress([disturbed, quiet, one_round(10, 19, 16)], 3)
    assert said == "round 3 of at most 9, quiet · 2 of 3 quiet ones · efficiency so far 0.850"


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_real_ranks_take_turns():
    sizes = ["--model", "resnet18", "--images", "4", "--size", "64", "--updates", "2", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "weak_scaling.py"), *sizes, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (first, *others) = json.loads(done.stdout)
    said = [line.partition(",")[0] for line in done.stderr.splitlines() if line.startswith(("warmed up", "round "))]
    assert said == ["warmed up", *(f"round {number} of at most 3" for number in range(1, len(others) + 2))]
    assert list(first) in (["one", "control", "two"], ["two", "control", "one"])
    assert first["one"]["rate"] == pytest.approx(4 / first["one"]["seconds"])
    assert first["two"]["rate"] == pytest.approx(8 / first["two"]["seconds"])
    assert 4 / first["control"]["seconds"] * 2 <= first["control"]["rate"] * 1.001
    assert first["one"]["parts"]["communication"] == first["control"]["parts"]["communication"] == 0
    assert first["two"]["parts"]["communication"] > 0
    for measured in first.values():
        assert sum(measured["parts"].values()) <= measured["seconds"] * 1.001
        assert min(measured["parts"].values()) >= 0 and 0 <= measured["others"] <= 1
