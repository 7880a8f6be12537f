"""`onehour train --hostfile` across hosts, through the real launcher, pdsh and sshd."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, Host
from tests.conftest import tiny_config
from tests.training import TOLERANCE, VAL, assert_the_same_training, onehour, output_of

pytestmark = [pytest.mark.root, pytest.mark.launcher]

ROOT = Path(__file__).parents[2]
# k = 12 logical workers of n = 8: one, two and three hosts of two ranks divide them. With n = 4 the network's last BN
# has 4 values to normalise, and one and two ranks on one machine end 0.7 apart for rounding alone; with n = 8, 2e-6
TWELVE_WORKERS = {"train_batch_size": 96, "recipe.reference_batch": 48}


def onehour_on(host: Host, folder: Path, *arguments: str | Path) -> subprocess.Popen:
    """`onehour` as a person starts it who is logged in on a host, in `folder`."""
    return host.start(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        env={"PYTHONPATH": str(ROOT)},
        cwd=folder,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def configure(data: Path, folder: Path, name: str) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tiny_config(data, folder / "runs" / name, **TWELVE_WORKERS)))
    return path


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster(3)


@pytest.fixture(scope="module")
def on_one_machine(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same configuration on this machine's two ranks."""
    path = configure(tiny_shards, tmp_path_factory.mktemp("local"), "local")
    assert f"{VAL} images each" in output_of(onehour("train", path, "--ranks", "2"))
    return path


@pytest.mark.parametrize("size", [2, 3])
def test_hosts_train_as_one_machine_does(size, cluster, on_one_machine, tiny_shards, tmp_path):
    first = cluster.hosts[0]
    path = configure(tiny_shards, tmp_path, "hosts")
    hostfile = cluster.hostfile(tmp_path / "hostfile", slots=2, hosts=cluster.hosts[:size])
    output = output_of(onehour_on(first, tmp_path, "train", path, "--hostfile", hostfile))
    assert f"{size} hosts × 2" in output and f"{VAL} images each" in output
    assert_the_same_training([on_one_machine, path], TOLERANCE)
    assert all(host.ranks() == {} for host in cluster.hosts)
