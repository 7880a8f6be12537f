"""A short storm of kills; `python -m tests.cluster.chaos` makes a long one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.chaos import Chaos
from tests.cluster.hosts import Cluster

pytestmark = [pytest.mark.root, pytest.mark.launcher, pytest.mark.timeout(900)]

KILLS, SEED = 5, 4


def test_a_run_that_is_killed_again_and_again_is_the_same_training(
    make_cluster: Callable[..., Cluster], tmp_path: Path
):
    chaos = Chaos(make_cluster(3), tmp_path, SEED)
    chaos.run(KILLS)
    assert chaos.storm.struck == KILLS and chaos.storm.again < KILLS * 10
