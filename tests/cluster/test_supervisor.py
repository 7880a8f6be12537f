"""`onehour launch --restarts`: hosts go and come back, and it is one training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.fault import MISTAKE
from pipeline.metrics import read_metrics
from tests.cluster.hosts import Cluster
from tests.cluster.launched import ONEHOUR_TRAIN, Launched, configure, tidy, wait_until_nothing_is_left
from tests.training import assert_the_same_training, damage_an_image, onehour, output_of

pytestmark = [pytest.mark.root, pytest.mark.launcher, pytest.mark.timeout(600)]

CHANGES = {
    "recipe.epochs": 80,  # 109 updates, of images large enough to take a second each
    "recipe.transform": {"size": 128, "scale": [0.5, 1.0], "evaluation_resize": 128},
    # without BN, which amplifies rounding: with it, two and four ranks are far apart after a hundred updates
    "recipe.model.name": "vit_tiny_patch16_224",
    "recipe.model.args": {"img_size": 128, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "optimizer.params.lr": 0.001,
    "scheduler.params.milestones": [20],
    "recipe.checkpoint.every_epochs": 5,
    "recipe.evaluation.every_epochs": 20,
    "recipe.watchdog.silent_seconds": 8,
}


TOLERANCE = 1e-3
ONEHOUR_LAUNCH = (*ONEHOUR_TRAIN[:-1], "launch")


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster(3)


@pytest.fixture(scope="module")
def unbroken(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on this machine's two ranks, without any interruption."""
    path = configure(tiny_shards, tmp_path_factory.mktemp("local"), "local", CHANGES)
    output_of(onehour("train", path, "--ranks", "2"))
    return path


def hosts_of(launched: Launched) -> list[int]:
    """How many ranks each process of the run had, in order."""
    events = read_metrics(launched.run / "metrics.jsonl")
    return [event["world_size"] for event in events if event["event"] == "start"]


def test_a_host_goes_and_comes_back(cluster, unbroken, tiny_shards, tmp_path):
    path = configure(tiny_shards, tmp_path, "hosts", CHANGES)
    hostfile = cluster.hostfile(tmp_path / "hostfile")
    options = ["--hostfile", hostfile, "--restarts", "3", "--min-nodes", "2"]
    with tidy(cluster):
        launched = Launched(cluster.hosts[0], path, *options, command=ONEHOUR_LAUNCH)
        launched.wait_for_step(15)
        cluster.hosts[2].kill_all()  # and it does not answer any more
        launched.wait_until(lambda: "launching 4 ranks × 3 accumulation on node-0, node-1" in launched.output)
        launched.wait_until(lambda: hosts_of(launched)[-1:] == [4] and launched.step() > 20)
        cluster.hosts[2].boot()
        output = launched.output_of(0)
        wait_until_nothing_is_left(cluster.hosts, 10)
    assert "node-2 does not answer" in output and "node-2 answers again" in output
    assert hosts_of(launched) == [6, 4, 6]
    assert "restart 1 of 3" in output and "restart 2" not in output
    events = read_metrics(launched.run / "metrics.jsonl")
    assert [event["host"] for event in events if event["event"] == "fault"] == ["node-2"]
    assert_the_same_training([unbroken, path], TOLERANCE)


def test_a_failure_that_repeats_is_not_tried_for_ever(cluster, tiny_shards, tmp_path):
    """Every attempt meets the same damaged image, which one rank alone decodes."""
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    damage_an_image(shards)
    path = configure(shards, tmp_path, "failing", CHANGES)
    hostfile = cluster.hostfile(tmp_path / "hostfile", hosts=cluster.hosts[:2])
    options = ["--hostfile", hostfile, "--restarts", "50"]
    with tidy(cluster):
        launched = Launched(cluster.hosts[0], path, *options, command=ONEHOUR_LAUNCH)
        assert launched.code(300) != 0
        wait_until_nothing_is_left(cluster.hosts, 10)
    assert launched.output.count("launching 4 ranks") == 2 and "on the same hosts twice" in launched.output


def test_a_mistake_that_every_rank_meets_is_not_tried_twice(cluster, tiny_shards, tmp_path):
    path = configure(tiny_shards, tmp_path, "mistaken", CHANGES)
    settings = json.loads(path.read_text())
    settings["recipe"]["model"]["args"]["drop_rate"] = 2.0  # a network that cannot be built
    path.write_text(json.dumps(settings))
    hostfile = cluster.hostfile(tmp_path / "hostfile", hosts=cluster.hosts[:2])
    with tidy(cluster):
        launched = Launched(cluster.hosts[0], path, "--hostfile", hostfile, "--restarts", "50", command=ONEHOUR_LAUNCH)
        assert launched.code(300) == MISTAKE
    assert launched.output.count("launching 4 ranks") == 1 and "drop_rate" in launched.output
