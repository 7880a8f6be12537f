"""`onehour doctor --hostfile` on a real cluster: one fault at a time, on one host, found there with its mend."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from shards import jpeg
from shards.cli import main as shards_main
from tests.cluster.hosts import Cluster, Host
from tests.conftest import tiny_config, write_images

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


class Site:
    """Two hosts, and a configuration with its shards and hostfile in a folder that both have."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.first, self.second = cluster.hosts
        self.data = folder / "shards"
        shutil.copytree(shards, self.data)
        self.run_parent = folder / "runs"
        self.run_parent.mkdir()
        self.config = folder / "tiny.json"
        self.config.write_text(json.dumps(tiny_config(self.data, self.run_parent / "tiny")))
        self.hostfile = cluster.hostfile(folder / "hosts", slots=2)

    def onehour(self, *arguments: str | Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-P", "-m", "pipeline.cli", *arguments]
        return self.first.run(command, env={"PYTHONPATH": str(ROOT)}, cwd=self.folder, timeout=280)

    def doctor(self, *arguments: str | Path) -> tuple[int, dict[str, Any]]:
        """Exit code and answer. Nothing that it writes to look for stays."""
        done = self.onehour("doctor", *arguments, "--hostfile", self.hostfile, "--json")
        assert not list(self.folder.rglob(".onehour-doctor-*"))
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def site(make_cluster: Callable[..., Cluster], tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Site:
    return Site(make_cluster(2, nics=["eth0", "net1"]), tmp_path_factory.mktemp("site"), tiny_shards)


def odd(answer: dict[str, Any], verdict: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Text and mend by check and host, of one verdict."""
    return {
        (check["about"], host): (finding["text"], "\n".join(finding["mend"]))
        for check in answer["checks"]
        for host, findings in check["hosts"].items()
        for finding in findings
        if finding["verdict"] == verdict
    }


def test_hosts_that_are_fine_and_how_fast_they_are_together(site: Site) -> None:
    code, answer = site.doctor(site.config)
    assert (code, answer["problems"]) == (0, 0), odd(answer, "wrong")
    assert odd(answer, "slow") == {}
    found = answer["all_reduce"]
    assert found["ranks"] == 4 and 0.001e9 < found["bus"] < 1000e9
    assert found["seconds"] * found["bus"] == pytest.approx(1.5 * found["bytes"]), "2 (n − 1) / n of the buffer"
    ((rate, *hosts),) = found["pairs"]
    assert hosts == ["node-0", "node-1"] and rate > 0.001e9
    (network,) = (check["hosts"] for check in answer["checks"] if check["about"] == "network")
    assert network["node-0"][0]["text"] == "10.77.0.1 on eth0"
    assert network["node-1"][0]["text"] == "reaches node-0 at 10.77.0.1 over net1"


@contextlib.contextmanager
def bound(host: Host, source: Path, target: Path) -> Iterator[None]:
    host.bind(source, target)
    try:
        yield
    finally:
        host.unbind(target)


@contextlib.contextmanager
def sessions_with(environment: dict[str, str], *hosts: Host) -> Iterator[None]:
    """Every session that sshd opens on the hosts has these variables."""
    before = [dict(host.environment) for host in hosts]
    try:
        for host in hosts:
            host.environment.update(environment)
            host.kill_all()
            host.boot()
        yield
    finally:
        for host, variables in zip(hosts, before, strict=True):
            host.environment.clear()
            host.environment.update(variables)
            host.kill_all()
            host.boot()


def refused_key(site: Site) -> AbstractContextManager:
    return bound(site.second, Path("/dev/null"), Path("/etc/ssh/identity.pub"))


@contextlib.contextmanager
def another_version(site: Site) -> Iterator[None]:
    files = importlib.metadata.files("timm")
    assert files is not None
    (metadata,) = (file.locate() for file in files if file.name == "METADATA")
    other = site.folder / "METADATA"
    text = Path(metadata).read_text(encoding="utf-8")
    other.write_text(text.replace(f"Version: {importlib.metadata.version('timm')}", "Version: 0.9.99", 1))
    with bound(site.second, other, Path(metadata)):
        yield


@contextlib.contextmanager
def other_code(site: Site) -> Iterator[None]:
    changed = site.folder / "mixing.py"
    changed.write_text((ROOT / "pipeline" / "mixing.py").read_text(encoding="utf-8") + "# a change of somebody's\n")
    with bound(site.second, changed, ROOT / "pipeline" / "mixing.py"):
        yield


@contextlib.contextmanager
def other_configuration(site: Site) -> Iterator[None]:
    other = site.folder / "other.json"
    other.write_text(site.config.read_text().replace('"lr": 0.02', '"lr": 0.03'))
    with bound(site.second, other, site.config):
        yield


@contextlib.contextmanager
def more_slots_than_gpus(site: Site) -> Iterator[None]:
    folder = site.folder / "bin"  # the launching host's PATH is every host's
    folder.mkdir(exist_ok=True)
    tool = folder / "nvidia-smi"
    first, second = (f"echo 'GPU {number}: NVIDIA H100 (UUID: GPU-{number})'" for number in range(2))
    tool.write_text(f"#!/bin/sh\n{first}\n[ $(uname -n) = {site.second.name} ] || {second}\n")
    tool.chmod(0o755)
    with sessions_with({"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin"}, site.first, site.second):
        yield


@contextlib.contextmanager
def missing_shards(site: Site) -> Iterator[None]:
    empty = site.folder / "empty"
    empty.mkdir(exist_ok=True)
    with bound(site.second, empty, site.data):
        yield


@contextlib.contextmanager
def other_shards(site: Site) -> Iterator[None]:
    out = site.folder / "other-shards"
    if not out.exists():
        images = site.folder / "images"
        write_images(images / "train", 26, seed=3)
        write_images(images / "val", 7, seed=2)
        assert shards_main(["prepare", "imagefolder", str(images), str(out), "--samples-per-shard", "33"]) == 0
    with bound(site.second, out, site.data):
        yield


@contextlib.contextmanager
def full_disk(site: Site) -> Iterator[None]:
    site.second.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", site.run_parent], check=True)
    try:
        yield
    finally:
        site.second.unbind(site.run_parent)


@contextlib.contextmanager
def small_disk(site: Site) -> Iterator[None]:
    site.second.run(["mount", "-t", "tmpfs", "-o", "size=50M", "tmpfs", site.run_parent], check=True)
    try:
        yield
    finally:
        site.second.unbind(site.run_parent)


@contextlib.contextmanager
def another_run_folder(site: Site) -> Iterator[None]:
    other = site.folder / "own-runs"
    other.mkdir(exist_ok=True)
    with bound(site.second, other, site.run_parent):
        yield


@contextlib.contextmanager
def no_working_folder(site: Site) -> Iterator[None]:
    empty = site.folder.with_name("nothing-there")
    empty.mkdir(exist_ok=True)
    # its parent, for a folder can be a working folder whatever is in it
    site.second.bind(empty, site.folder.parent)
    try:
        yield
    finally:
        site.second.unbind(site.folder.parent)


def wrong_clock(site: Site) -> AbstractContextManager:
    if not FAKETIME.exists():
        pytest.skip("needs libfaketime (Debian: apt install libfaketime)")
    fake = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "-90s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return sessions_with(fake, site.second)


@contextlib.contextmanager
def port_taken(site: Site) -> Iterator[None]:
    code = "import socket; s = socket.create_server(('', 29500)); print(flush=True); s.accept()"
    process = site.first.start([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def firewall(site: Site) -> Iterator[None]:
    rule = ["priority", "10", "ipproto", "tcp", "sport", "29500", "blackhole"]  # its answers go nowhere
    site.first.run(["ip", "rule", "add", *rule], check=True)
    try:
        yield
    finally:
        site.first.run(["ip", "rule", "del", *rule], check=True)


def empty_extension(site: Site) -> AbstractContextManager:
    reason = jpeg.unavailable()
    if reason is not None:
        pytest.skip(f"the C extension {reason}")
    return bound(site.second, Path("/dev/null"), next((ROOT / "shards" / "jpeg").glob("_native*.so")))


def wrong_network_card(site: Site) -> AbstractContextManager:
    return sessions_with({"GLOO_SOCKET_IFNAME": "eth0"}, site.second)


def other_variables(site: Site) -> AbstractContextManager:
    return sessions_with({"NCCL_ALGO": "Ring"}, site.second)


FAULTS: list[tuple[Callable[[Site], AbstractContextManager], str, str, str, str]] = [
    (refused_key, "ssh", "node-1", "Permission denied", "ssh-copy-id node-1"),
    (no_working_folder, "onehour", "node-1", "site", "must be on every host, at the same path"),
    (another_version, "versions", "node-1", "timm 0.9.99, node-0 has", "same environment on every host"),
    (other_code, "code", "node-1", "pipeline/mixing.py differs from node-0's", "git pull"),
    (other_configuration, "configuration", "node-1", "optimizer.params.lr is 0.03, on node-0 0.02", "copy it"),
    (more_slots_than_gpus, "slots", "node-1", "slot 1 is used, and there is 1 GPU", "slots=1 for node-1"),
    (missing_shards, "shards", "node-1", "shards", "prepare"),
    (other_shards, "shards", "node-1", "train: index", "shards verify"),
    (full_disk, "run folder", "node-1", "cannot be written: No space left", "df "),
    (small_disk, "run folder", "node-1", "free, 3 + 1 checkpoints of", "recipe.checkpoint.keep"),
    (another_run_folder, "run folder", "node-1", "what node-0 writes there is not seen here", "recipe.run"),
    (wrong_clock, "clock", "node-1", "behind the other hosts", "timedatectl"),
    (port_taken, "network", "node-0", "port 29500 of node-0 cannot be used: address already in use", "--master_port"),
    (
        firewall,
        "network",
        "node-1",
        "does not reach port 29500 of node-0 (10.77.0.1: timed out)",
        "Open TCP port 29500",
    ),
    (empty_extension, "decode", "node-1", "node-0 has C extension", "recipe.loader.decoder=simplejpeg"),
    (wrong_network_card, "environment", "node-1", "network cards here are net1 (10.77.0.2)", "Unset it"),
    (other_variables, "environment", "node-1", "NCCL_ALGO=Ring, node-0 has no NCCL_ALGO", "sshd_config"),
]
WITH_CONFIGURATION = (
    other_configuration,
    missing_shards,
    other_shards,
    full_disk,
    small_disk,
    another_run_folder,
)
"""What is only seen with one; without, no images are decoded and nothing waits for torch."""


@pytest.mark.parametrize(("plant", "about", "host", "text", "mend"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_a_fault(plant: Callable, about: str, host: str, text: str, mend: str, site: Site) -> None:
    with plant(site):
        code, answer = site.doctor(*[site.config] * (plant in WITH_CONFIGURATION), "--quick")
    wrong = odd(answer, "wrong")
    assert code == 1 and answer["problems"] >= 1
    assert set(wrong) == {(about, host)}, "and nothing else is called wrong"
    findings = next(check["hosts"] for check in answer["checks"] if check["about"] == about)[host]
    named = [finding for finding in findings if finding["verdict"] == "wrong" and text in finding["text"]]
    assert named, findings
    assert mend in "\n".join(named[0]["mend"]), named


def test_a_host_that_is_gone_holds_up_nobody(site: Site) -> None:
    site.second.disconnect()
    try:
        start = time.monotonic()
        code, answer = site.doctor(site.config)
        seconds = time.monotonic() - start
    finally:
        site.second.connect()
    assert code == 1
    ((place, (_, mend)),) = odd(answer, "wrong").items()
    assert place == ("ssh", "node-1") and "ssh node-1 true" in mend
    assert answer["all_reduce"] == {"skipped": "not tried: ssh first"}
    assert seconds < 45, "what the other host needs, and eight seconds of waiting"


def test_a_launching_machine_without_pdsh(site: Site) -> None:
    pdsh = shutil.which("pdsh")
    assert pdsh is not None
    with bound(site.first, Path("/dev/null"), Path(pdsh).resolve()):
        code, answer = site.doctor()
    launcher, all_reduce = answer["summary"]
    assert (code, launcher["about"], launcher["verdict"], answer["problems"]) == (1, "launcher", "wrong", 1)
    assert "pdsh is not on PATH" in launcher["text"] and "apt install pdsh" in launcher["mend"][0]
    assert all_reduce["text"] == "not tried: launcher first"


def test_debian_s_own_line_in_etc_hosts(site: Site) -> None:
    hosts = site.folder / "etc-hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 node-1\n10.77.0.1 node-0\n10.77.0.2 node-1\n")
    with bound(site.second, hosts, Path("/etc/hosts")):
        code, answer = site.doctor("--quick")
    ((place, (text, mend)),) = odd(answer, "slow").items()
    assert (code, place) == (0, ("environment", "node-1"))
    assert "node-1 is 127.0.1.1 to itself" in text and "/etc/hosts" in mend


def test_it_is_a_page_for_people_and_a_wrong_hostfile_is_a_mistake_in_the_command(site: Site) -> None:
    with other_configuration(site):
        done = site.onehour("doctor", site.config, "--hostfile", site.hostfile, "--quick")
    assert done.returncode == 1 and done.stderr == ""
    first, *rest = done.stdout.splitlines()
    assert first.split() == ["node-0", "node-1"]
    assert any(line.split() == ["configuration", "✓", "✗"] for line in rest)
    assert "  ✗ node-1: optimizer.params.lr is 0.03, on node-0 0.02" in rest
    assert rest[-1] == "1 problem; training would fail or differ."
    done = site.onehour("doctor", site.config, "--hostfile", site.folder / "nothing")
    assert done.returncode == 2 and "there is no such hostfile" in done.stderr
    done = site.onehour("doctor", site.config, "--hostfile", site.hostfile, "--exclude", "node-7")
    assert done.returncode == 2 and "node-7 is not in the hostfile" in done.stderr


def test_a_host_alone_and_without_a_configuration(site: Site) -> None:
    done = site.onehour("doctor", "--hostfile", site.hostfile, "--include", "node-1:0", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["hosts"], answer["problems"]) == (0, ["node-1"], 0)
    assert answer["all_reduce"] == {"skipped": "there is one rank only"}
