"""The hosts that the other tests of this folder run on are apart from each other and from this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Cluster, Host

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    environments = [{}, {"PLANTED": "two words", "OTHER": "a;b"}, {}]
    return make_cluster(3, nics=["eth0", "ens5", "eth0"], environments=environments)


def ssh(host: Host, other: Host, command: str) -> str:
    return host.run(["ssh", other.name, command], check=True).stdout.strip()


def outside() -> tuple[str, str, list[str], str]:
    """What this machine shows of the hosts on it: devices, mounts, named namespaces, its own name."""
    devices = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    named = [entry.name for entry in Path("/run/netns").glob("*")] + [
        entry.name for entry in Path("/etc").glob("netns")
    ]
    return devices, Path("/proc/self/mounts").read_text(), named, socket.gethostname()


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_every_host_knows_all_by_name_and_lets_them_in(cluster: Cluster):
    for host in cluster.hosts:
        for number, other in enumerate(cluster.hosts):
            assert ssh(host, other, "hostname; hostname -I").split() == [f"node-{number}", f"10.77.0.{number + 1}"]
            assert host.run(["getent", "hosts", other.name]).stdout.split() == [other.address, other.name]
    assert ssh(cluster.hosts[0], cluster.hosts[1], "ls /sys/class/net").split() == ["ens5", "lo"]


def test_sessions_have_what_a_login_has_and_nothing_of_the_tests(cluster: Cluster, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    first, second, _ = cluster.hosts
    assert (
        ssh(first, first, "echo $PATH $PYTHONDONTWRITEBYTECODE $PLANTED")
        == first.run(["sh", "-c", "echo $PATH"]).stdout.strip()
    )
    for line in (
        ssh(first, second, 'echo "$PLANTED/$OTHER"'),
        second.run(["sh", "-c", 'echo "$PLANTED/$OTHER"']).stdout,
    ):
        assert line.strip() == "two words/a;b"
    given = second.run(["sh", "-c", 'echo "$PLANTED $MORE"; pwd'], env={"MORE": "3", "PLANTED": "1"}, cwd=ROOT)
    assert given.stdout.split() == ["1", "3", str(ROOT)]


def test_another_file_on_one_host_only(cluster: Cluster, tmp_path: Path):
    first, second, _ = cluster.hosts
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_text("ours")
    theirs.write_text("theirs")
    second.bind(theirs, ours)
    second.kill_all()
    second.boot()
    assert ssh(first, second, f"cat {ours}") == "theirs"
    assert ssh(second, first, f"cat {ours}") == ours.read_text() == "ours"
    second.unbind(ours)
    assert ssh(first, second, f"cat {ours}") == "ours"


def test_a_pulled_cable_and_a_reboot(cluster: Cluster):
    first, second, third = cluster.hosts
    second.disconnect()
    assert not first.reaches(second, seconds=1) and first.reaches(third)
    second.connect()
    assert first.reaches(second)
    process = second.start(["sleep", "1000"])
    orphan = int(ssh(first, second, "setsid sleep 1000 >/dev/null 2>&1 & readlink /proc/self; echo $!").split()[-1])
    assert orphan and process.pid in second.pids()
    before = third.pids()
    second.kill_all()
    assert second.pids() == [] and process.wait(5) == -signal.SIGKILL
    assert not first.reaches(second) and third.pids() == before
    second.environment["PLANTED"] = "after the reboot"
    second.boot()
    assert ssh(first, second, "echo $PLANTED") == "after the reboot"


def test_a_started_process_is_the_command_itself(cluster: Cluster):
    first, second, _ = cluster.hosts
    process = first.start(["sh", "-c", "echo $$; exec sleep 1000"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() != str(process.pid), "numbers of its own on a host"
    assert process.pid in first.pids() and process.pid not in second.pids()
    assert second.run(["pkill", "-f", "sleep 1000"]).returncode == 1, "another host's processes are not seen"
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM
    process.stdout.close()
    with pytest.raises(subprocess.TimeoutExpired):
        first.run(["sh", "-c", "sleep 1000; true"], timeout=0.2)
    assert not any("sleep" in psutil.Process(pid).cmdline() for pid in first.pids())


def test_ranks_are_found_without_their_own_children(cluster: Cluster):
    first, second, _ = cluster.hosts
    script = "RANK=2 sh -c 'sleep 1000; true' & RANK=3 sleep 1000 & echo; wait"
    launcher = first.start(["sh", "-c", script], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 10
    while len(first.ranks()) < 2:
        assert time.monotonic() < deadline, first.ranks()
    assert psutil.Process(first.ranks()[3]).ppid() == launcher.pid
    assert second.ranks() == {}
    os.kill(first.ranks()[2], signal.SIGKILL)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.communicate(timeout=5)
    assert first.ranks() == {}


def test_clusters_side_by_side_leave_nothing(cluster: Cluster, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = outside()
    with Cluster(2) as other, pytest.raises(ZeroDivisionError), other:
        pids = [pid for host in other.hosts for pid in host.pids()]
        other.hosts[1].start(["sleep", "1000"])
        other.hosts[0].disconnect()
        assert cluster.hosts[0].reaches(cluster.hosts[1]), "the same names and addresses, on another network"
        assert ssh(other.hosts[1], other.hosts[1], "hostname") == "node-1"
        assert outside() == before
        raise ZeroDivisionError
    assert living(pids) == [] and outside() == before
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_tests_that_were_killed(cluster: Cluster):
    before = outside()
    script = """
import subprocess, time
from tests.cluster.hosts import Cluster
with Cluster(2) as cluster:
    command = ["ssh", "node-1", "setsid sleep 1000 & echo; wait"]
    cluster.hosts[0].start(command, stdout=subprocess.PIPE).stdout.readline()
    print(*(pid for host in cluster.hosts for pid in host.pids()), flush=True)
    time.sleep(1000)
"""
    tests = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in tests.stdout.readline().split()]
    # two sshds, the client, its session's server and shell, and what that started
    assert len(pids) == 6 and living(pids) == pids
    tests.kill()
    tests.communicate()
    deadline = time.monotonic() + 10
    while living(pids):
        assert time.monotonic() < deadline, living(pids)
        time.sleep(0.01)
    assert outside() == before


def test_a_host_that_cannot_be_made_leaves_nothing():
    before = outside()
    with pytest.raises(subprocess.CalledProcessError):
        Cluster(2, nics=["eth0", "a-name-that-is-too-long"])
    assert outside() == before
