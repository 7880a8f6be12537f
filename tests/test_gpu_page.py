"""docs/gpu.md: its configuration is valid and plans what the page says, and its tables name what there is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pipeline import config, plan
from pipeline.config import Config
from pipeline.schema import Step

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_points import SECTIONS  # noqa: E402
from gpu_required import PUBLISHED, REQUIRED  # noqa: E402

PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def example(tmp_path: Path) -> Config:
    path = tmp_path / "example.json"
    path.write_text(EXAMPLE)
    return config.load(path)


def test_the_configuration_plans_what_the_page_says(example):
    resolved = plan.resolve(example, 32, samples=1_281_167)
    rows = dict(resolved.page())
    (promised,) = re.findall(r"`(256 logical workers.*?)`", PAGE)
    assert promised in rows["batch"]
    assert resolved.averages_gradients


def test_every_key_of_the_step_has_a_row():
    named = set(re.findall(r"^\| `recipe\.step\.(\w+)`", PAGE, re.MULTILINE))
    assert named == set(Step.model_fields)


def test_what_hands_the_averaging_to_deepspeed_does_so(example):
    (sentence,) = re.findall(r"asks for what is its own: (.*?)\. ", PAGE, re.DOTALL)
    asked = {
        "communication_data_type": '"fp16"',
        "prescale_gradients": "true",
        "gradient_predivide_factor": "2.0",
        "comms_logger": '{"enabled": true}',
        "wall_clock_breakdown": "true",
    }
    assert set(re.findall(r"`(\w+)`", sentence)) == set(asked)
    for key, value in asked.items():
        changed = config.load(example.path, [f"{key}={value}"])
        assert not plan.resolve(changed, 32, samples=1_281_167).averages_gradients, key


def test_every_section_of_the_benchmark_has_a_row():
    named = re.findall(r"^\| `([\w-]+)` \|", PAGE.partition("## Measuring")[2], re.MULTILINE)
    assert set(named) == set(SECTIONS) - {"data"}


def test_what_is_required_is_what_the_page_says():
    bounds = re.findall(r"≥ ([\d.,]*\d)", PAGE.partition("| required | |")[2])
    assert [float(bound.replace(",", "")) for bound in bounds] == [required.bound for required in REQUIRED]
    assert f"{PUBLISHED:,}" in PAGE
