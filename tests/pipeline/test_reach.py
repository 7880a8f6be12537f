"""Where the ranks of several hosts meet: decided from what each host says, and what this one says really."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline import reach, remote
from pipeline.reach import MARK, MeetingPlace, answering, meeting_place
from pipeline.remote import Answer
from shards.errors import UserError

TWO_NETWORKS = ["10.0.0.1", "192.168.7.1"]


def says(addresses: list[str], named: list[str], port: int = 29500) -> str:
    return MARK + json.dumps({"addresses": addresses, "named": named, "port": port}) + "\n"


class Hosts(dict[str, str]):
    """What hosts print, by name; a host that is none of them cannot be reached.

    Attributes:
        commands: that they were given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[list[str]] = []


@pytest.fixture
def hosts(monkeypatch):
    answers = Hosts()

    def everywhere(hosts, command, **options):
        answers.commands.append(command)
        return {
            host: Answer(host, 0, answers[host], "", 0, 1)
            if host in answers
            else Answer(host, 255, "", "ssh: connect to host: No route to host\n", 0, 8)
            for host in hosts
        }

    monkeypatch.setattr(remote, "run_everywhere", everywhere)
    return answers


# ---------------------------------------------------------------- of answers


@pytest.mark.parametrize(
    ("own", "others", "address"),
    [
        (TWO_NETWORKS, [["192.168.7.1"], ["192.168.7.1"]], "192.168.7.1"),  # not the first that it has
        (TWO_NETWORKS, [["192.168.7.1"], ["10.0.0.1"], ["10.0.0.1"]], "10.0.0.1"),  # by what most of them know it
        (TWO_NETWORKS, [["10.0.0.1", "192.168.7.1"], ["192.168.7.1"]], "192.168.7.1"),
        (TWO_NETWORKS, [["127.0.1.1"], ["192.168.7.1"]], "192.168.7.1"),  # an entry that is wrong there
        (TWO_NETWORKS, [["203.0.113.9"], []], "10.0.0.1"),  # nobody knows one of its own: a NAT's, or no name
        ([], [["10.0.0.1"]], "127.0.0.1"),  # the loopback is all that there is
    ],
)
def test_the_first_hosts_address_is_one_of_its_own_that_the_others_know(hosts, own, others, address):
    hosts["a"] = says(own, ["127.0.1.1"])  # its own view, as Debian's /etc/hosts has it
    names = ["a"]
    for number, named in enumerate(others):
        names.append(f"b{number}")
        hosts[names[-1]] = says([f"10.0.0.{number + 2}"], named)
    assert meeting_place(names, None, {}) == MeetingPlace(address, 29500)
    [command] = hosts.commands
    assert command[-2:] == ["a", "29500"], "each is asked for the first one"


def test_one_host_meets_itself_on_the_loopback(hosts):
    hosts["a"] = says(TWO_NETWORKS, ["10.0.0.1"])
    assert meeting_place(["a"], None, {}) == MeetingPlace("127.0.0.1", 29500)


def test_a_port_that_is_taken_there_is_another_and_the_users_is_the_users(hosts):
    hosts["a"], hosts["b"] = says(["10.0.0.1"], [], port=40123), says(["10.0.0.2"], ["10.0.0.1"], port=5)
    assert meeting_place(["a", "b"], None, {}) == MeetingPlace("10.0.0.1", 40123)
    assert meeting_place(["a", "b"], None, {"--master_port": "1234"}) == MeetingPlace("10.0.0.1", 1234)
    assert meeting_place(["a", "b"], None, {"--master_addr": "head"}) == MeetingPlace("head", 40123)
    assert [command[-1] for command in hosts.commands] == ["29500", "1234", "29500"]


def test_hosts_that_do_not_answer_are_all_named_with_their_reasons(hosts):
    hosts["a"], hosts["c"] = says(["10.0.0.1"], []), "Welcome to c!\n"
    with pytest.raises(UserError) as error:
        meeting_place(["a", "b", "c", "d"], None, {"--master_addr": "10.0.0.1", "--master_port": "1"})
    assert error.value.headline == "3 of 4 hosts cannot start a rank: b, c, d"
    assert "b: ssh: connect to host: No route to host" in str(error.value)
    assert "c: its answer is not that of this program" in str(error.value)
    assert str(Path.cwd()) in str(error.value) and sys.executable in str(error.value)


def test_what_login_scripts_print_is_passed_over(hosts):
    hosts["a"] = f"Welcome!\n{MARK}not this one\n" + says(["10.0.0.1"], []) + "bye\n"
    hosts["b"] = f"  {MARK}\n" + says(["10.0.0.2"], ["10.0.0.1"])
    assert meeting_place(["a", "b"], None, {}).address == "10.0.0.1"


def test_which_hosts_answer(hosts):
    hosts["a"], hosts["c"] = says(["10.0.0.1"], []), says(["10.0.0.3"], [])
    present, silent = answering(["c", "b", "a"])
    assert present == ["c", "a"], "in the order that they were given"
    assert silent == {"b": "ssh: connect to host: No route to host"}


# ---------------------------------------------------------------- of this host


def ask(first: str, port: int) -> dict:
    """As a host is asked: the module in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pipeline.reach", first, str(port)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(MARK) and done.stderr == ""
    return json.loads(done.stdout.removeprefix(MARK))


def test_this_host_tells_its_addresses_what_it_knows_and_a_free_port():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        answer = ask("localhost", taken)
    assert answer["port"] not in (taken, None)
    assert answer["named"] == ["127.0.0.1"]
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries if "." in entry.address}
    assert answer["addresses"] == sorted(address for address in own if not address.startswith("127."))


def test_a_free_port_is_taken_as_it_is_and_an_unknown_name_has_no_address():
    with socket.socket() as other:
        other.bind(("", 0))
        free = other.getsockname()[1]
    assert reach._answer("no-such-host.invalid", free)["port"] == free
    assert reach._answer("no-such-host.invalid", free)["named"] == []


def test_connections_of_a_training_that_just_ended_do_not_hold_its_port():
    """They linger (TIME_WAIT) for a minute, and the store of the next one can have the port all the same."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # the side that closes first lingers
    assert reach._free(port) == port
