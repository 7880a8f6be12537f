"""`onehour train --hostfile` across hosts, through the real launcher, pdsh and sshd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster
from tests.cluster.launched import Launched, configure
from tests.training import TOLERANCE, VAL, assert_the_same_training, onehour, output_of

pytestmark = [pytest.mark.root, pytest.mark.launcher, pytest.mark.timeout(900)]


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
    output = Launched(first, path, "--hostfile", hostfile).output_of(0)
    assert f"{size} hosts × 2" in output and f"{VAL} images each" in output
    assert_the_same_training([on_one_machine, path], TOLERANCE)
    assert all(host.ranks() == {} for host in cluster.hosts)
