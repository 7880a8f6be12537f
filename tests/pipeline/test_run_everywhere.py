"""Commands on many hosts at once: a real sshd, words that arrive as they were, and hosts that do not answer."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import remote
from pipeline.hosts import free_port

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
HOSTS = ["here", "also-here"]

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs ssh and sshd (Debian: apt install openssh-server)"
)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an `ssh` that knows some hosts: two that answer, one deaf, one that refuses, one without a key."""
    folder = tmp_path_factory.mktemp("sshd")
    port, closed = free_port(), free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder / 'user.pub'}\nPermitRootLogin yes\nMaxStartups 100\n"
    )
    deaf = socket.create_server(("127.0.0.1", 0))  # takes the connection, and then says nothing
    lines = [
        f"Host deaf\n Port {deaf.getsockname()[1]}",
        f"Host closed\n Port {closed}",
        f"Host stranger\n IdentityFile {folder / 'host'}",
        f"Host * !stranger\n IdentityFile {folder / 'user'}",
        f"Host *\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n IdentitiesOnly yes",
        " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n",
    ]
    (folder / "config").write_text("\n".join(lines))
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "config"} "$@"\n')
    wrapper.chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD is not None
    log = (folder / "log").open("w")
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    yield folder / "bin"
    process.terminate()
    process.wait(10)
    deaf.close()
    log.close()


@pytest.fixture(autouse=True)
def ssh_on_path(sshd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{sshd}:{os.environ['PATH']}")


def test_words_arrive_as_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "a folder's"
    folder.mkdir()
    words = ["two words", "$HOME", "%h", "it's", '"quoted"', "a;b|c&d", "back\\slash", "", "new\nline", "*", "é"]
    code = "import os, sys; print([*sys.argv[1:], os.getcwd(), os.environ['A_B'], sys.stdin.read()])"
    answers = remote.run_everywhere(
        HOSTS, [sys.executable, "-c", code, *words], cwd=folder, environment={"A_B": "x $y 'z'"}, stdin="in\nput"
    )
    assert list(answers) == HOSTS
    expected = repr([*words, str(folder), "x $y 'z'", "in\nput"]) + "\n"
    assert [answer.stdout for answer in answers.values()] == [expected] * 2
    assert all(answer.code == 0 and answer.problem is None and answer.stderr == "" for answer in answers.values())


def test_a_line_is_the_shell_s(tmp_path: Path) -> None:
    (answer,) = remote.run_everywhere(["here"], "echo $((6*7)); echo no >&2; exit 3", cwd=tmp_path).values()
    assert (answer.stdout, answer.stderr, answer.code, answer.problem) == ("42\n", "no\n", 3, "no")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (answer,) = remote.run_everywhere(["here"], ["true"], cwd=tmp_path / "nothing").values()
    assert answer.code not in (0, None, remote.SSH_FAILED) and "nothing" in (answer.problem or "")


def test_hosts_run_at_once_and_the_bad_ones_hold_up_nobody() -> None:
    hosts = ["here", "closed", "stranger", "deaf", *(f"h{number}" for number in range(6))]
    start = time.monotonic()
    answers = remote.run_everywhere(hosts, "sleep 2; echo done", connect_seconds=3)
    seconds = time.monotonic() - start
    good = [answer for answer in answers.values() if answer.code == 0]
    assert [answer.host for answer in good] == ["here", *hosts[4:]]
    assert all(answer.stdout == "done\n" and answer.seconds >= 2 for answer in good)
    assert seconds < 12, "seven times two seconds one after the other"
    assert [answers[host].code for host in ("closed", "stranger", "deaf")] == [remote.SSH_FAILED] * 3
    assert "refused" in (answers["closed"].problem or "")
    assert "Permission denied" in (answers["stranger"].problem or ""), "it did not ask for a password"
    assert "timed out" in (answers["deaf"].problem or "") and answers["deaf"].seconds < 8


def test_a_command_that_does_not_end_is_given_up_with_what_it_said() -> None:
    start = time.monotonic()
    (answer,) = remote.run_everywhere(["here"], "echo begun; sleep 60", timeout=3).values()
    assert time.monotonic() - start < 6
    assert answer.code is None and answer.stdout == "begun\n" and answer.problem == "no answer within 3 s"


def test_much_output_and_much_input_do_not_wait_for_each_other() -> None:
    text = "x" * 1_000_000
    (answer,) = remote.run_everywhere(["here"], "cat; cat /dev/zero | head -c 1000000 >&2", stdin=text).values()
    assert answer.code == 0 and answer.stdout == text and len(answer.stderr) == 1_000_000


def test_a_host_that_looks_like_an_option(tmp_path: Path) -> None:
    (answer,) = remote.run_everywhere([f"-oProxyCommand=touch {tmp_path / 'x'}"], "true").values()
    assert answer.code == remote.SSH_FAILED and not (tmp_path / "x").exists()


def test_a_command_runs_while_the_block_does() -> None:
    code = "import sys; print('ready', flush=True); sys.stdin.read(); print('over')"
    with remote.started("here", [sys.executable, "-c", code]) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert process.poll() is None
    assert process.returncode == 0, "it ended by itself when its input did"
