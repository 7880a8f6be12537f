"""Ranks meet within a given time, or learn who is missing: real stores, with a thread for each rank."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import psutil
import pytest

from pipeline import meeting
from pipeline.hosts import free_port
from pipeline.meeting import RankError, choose_interface, connect, hosts_of, meet
from pipeline.rendezvous import Rendezvous

SOON = timedelta(seconds=2)
"""Of which all that are there must come: on a machine that has other things to do, half a second is not enough."""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def places(size: int, address: str = "127.0.0.1") -> list[Rendezvous]:
    port = free_port()
    return [Rendezvous(rank, size, rank, size, address, port, "deepspeed") for rank in range(size)]


def meet_all(ranks: list[Rendezvous], timeout: timedelta = SOON) -> list:
    """What each rank got: its store, or its error."""

    def one(place: Rendezvous) -> object:
        try:
            return meet(place, timeout)
        except RankError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_meet_and_know_each_others_hosts():
    ranks = places(4)
    stores = meet_all(ranks, timedelta(seconds=20))
    more = connect(ranks[2])
    more.set("said", "hello")
    assert [store.get("said") for store in stores] == [b"hello"] * 4
    assert hosts_of(more, range(4)) == [socket.gethostname()] * 4


@pytest.mark.parametrize(("missing", "named"), [([2], "rank 2 is"), ([1, 3], "ranks 1, 3 are")])
def test_who_is_missing_is_named_in_time(missing, named):
    began = time.monotonic()
    ranks = places(5)
    present = [place for place in ranks if place.rank not in missing]
    errors = meet_all(present)
    assert 1.9 < time.monotonic() - began < 15
    for error in errors:
        assert isinstance(error, RankError)
        assert error.headline == f"{5 - len(missing)} of 5 ranks came within 2 s: {named} missing"
        assert f"127.0.0.1:{ranks[0].master_port}: onehour doctor" in str(error)


def test_of_many_that_are_missing_some_are_named():
    [error] = meet_all(places(2000)[:1])
    assert "1 of 2,000 ranks came within 2 s: ranks 1, 2, 3, 4, 5, 6, 7, 8 and 1,991 more are missing" in str(error)


def test_a_rank_without_rank_0_says_where_it_looked():
    began = time.monotonic()
    ranks = places(2)
    [error] = meet_all(ranks[1:])
    assert time.monotonic() - began < 15
    assert error.headline == (
        f"127.0.0.1:{ranks[1].master_port}: rank 1 on {socket.gethostname()} does not reach rank 0 there within 2 s"
    )
    assert "--master_addr" in str(error)


@pytest.mark.parametrize("seconds", [3, 9])
def test_rank_0_that_never_comes_is_waited_for_as_long_as_was_said(seconds):
    """torch's own waiting takes 20 seconds more after 10, and 127 more after 120 (measured)."""
    began = time.monotonic()
    [error] = meet_all(places(2)[1:], timedelta(seconds=seconds))
    assert isinstance(error, RankError) and seconds < time.monotonic() - began < seconds + 10


def test_rank_0_may_come_late():
    ranks = places(2)

    def late(place: Rendezvous) -> object:
        if place.rank == 0:
            time.sleep(2)
        return meet(place, timedelta(seconds=20))

    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(late, ranks))
    stores[0].set("said", "hello")
    assert stores[1].get("said") == b"hello"


def test_a_name_that_nobody_knows():
    [error] = meet_all([replace(places(2)[1], master_addr="no-such-host.invalid")])
    assert "no-such-host.invalid" in error.headline and "does not reach rank 0 there" in error.headline


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        [error] = meet_all([Rendezvous(0, 1, 0, 1, "127.0.0.1", port, "deepspeed")])
    assert error.headline.startswith(f"127.0.0.1:{port}: rank 0 cannot open the port that the ranks meet at: ")
    assert "another --master_port" in str(error) and len(error.headline) < 300 and "\n" not in error.headline


def test_two_processes_that_are_the_same_rank():
    """Of another training with the same port: neither must be taken into this one."""
    ranks = places(2)
    answers = meet_all([ranks[0], ranks[1], ranks[1]], timedelta(seconds=3))
    refused = [answer for answer in answers if isinstance(answer, RankError)]
    assert len(refused) == 1
    assert refused[0].headline == f"two processes are rank 1 of 2; this one is on {socket.gethostname()}"


def test_a_restart_by_torchruns_agent_meets_anew_in_the_store_of_the_agent(monkeypatch):
    """The agent keeps it open, and what the ranks before the restart wrote is in it."""
    import torch.distributed as dist

    [place] = places(1)
    agent = dist.TCPStore("127.0.0.1", place.master_port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for count in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        store = meet(place, SOON)
        assert not store.check(["abort"])
        store.set("abort", "of this attempt")
    assert agent.num_keys() >= 2


# ---------------------------------------------------------------- interfaces

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture
def variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "of before")  # monkeypatch then removes what the code sets
        monkeypatch.delenv(name)


def of_two_hosts(address: str) -> Rendezvous:
    return Rendezvous(1, 4, 1, 2, address, 29500, "deepspeed")


def test_on_one_host_no_interface_is_chosen(variables):
    for place in places(2, "192.0.2.7"):
        choose_interface(place)
    assert not [name for name in VARIABLES if name in os.environ]


def test_between_hosts_the_interface_towards_rank_0_is_chosen(variables):
    addresses = {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    }
    if not addresses:
        pytest.skip("this machine has the loopback alone")
    address, interface = next(iter(addresses.items()))
    choose_interface(of_two_hosts(address))
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={interface}", "this one, and not those that begin so"


def test_rank_0s_host_that_knows_itself_by_the_loopback_takes_its_way_to_the_others(variables, monkeypatch):
    """As Debian's /etc/hosts has it: 127.0.1.1."""
    ways = {"127.0.1.1": None, meeting.ELSEWHERE: "eth7"}
    monkeypatch.setattr(meeting, "interface_towards", lambda address, port: ways[address])
    choose_interface(of_two_hosts("127.0.1.1"))
    assert [os.environ[name] for name in VARIABLES] == ["eth7", "=eth7"]


def test_the_users_variable_wins(variables, monkeypatch):
    monkeypatch.setattr(meeting, "interface_towards", lambda address, port: "eth7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    choose_interface(of_two_hosts("10.0.0.1"))
    assert [os.environ[name] for name in VARIABLES] == ["ib0", "=eth7"]
