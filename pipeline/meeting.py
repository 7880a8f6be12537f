"""Where the ranks meet: rank 0's store, reached by all within two minutes, or a message that says who is missing.

The same waiting inside torch takes ten minutes or more, and ends with "timed out" on every rank.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from pipeline.rendezvous import Rendezvous, interface_towards
from shards.errors import UserError

JOIN_TIMEOUT = timedelta(seconds=float(os.environ.get("ONEHOUR_JOIN_SECONDS", "120")))
MET = "met"
STORE_TIMEOUT = timedelta(minutes=30)
"""Of waiting for a key; whoever is missing is found by the watch before."""

ATTEMPT_SECONDS = 5.0
PAUSE_SECONDS = 0.1, 0.5
"""Of reaching the store's port once, and between two attempts."""


class RankError(UserError):
    """A rank is missing or gone: nobody's mistake in the configuration, and worth another try."""


ELSEWHERE = "192.0.2.1"
"""An address of no machine (RFC 5737): nothing is sent there, but a host knows by which interface it would be."""


def meet(place: Rendezvous, timeout: timedelta = JOIN_TIMEOUT) -> dist.Store:
    """Wait until every rank has come to the store.

    Args:
        place: this rank's numbers, and where rank 0 is.
        timeout: for all of them to come.

    Raises:
        RankError: rank 0 is not there, or a rank is missing; it names them.
    """
    store = connect(place, timeout, first=place.rank == 0)
    store.set(_host_key(place.rank), socket.gethostname())
    if store.add(f"count/{place.rank}", 1) > 1:
        raise RankError(
            f"two processes are rank {place.rank} of {place.size}; this one is on {socket.gethostname()}",
            "Another training may be using the same address and port: give this one another --master_port.",
        )
    hosts = [_host_key(rank) for rank in range(place.size)]
    try:
        if place.rank == 0:  # alone: many ranks would ask for many keys each
            store.wait(hosts, timeout)
            store.set(MET, "")
        store.wait([MET], 1.1 * timeout)  # so that rank 0 is the first to say who is missing
    except RuntimeError:
        try:
            missing = [rank for rank, key in enumerate(hosts) if not store.check([key])]
        except RuntimeError:
            missing = [0]  # it has the store
        raise RankError(
            f"{place.size - len(missing):,} of {place.size:,} ranks came within {timeout.total_seconds():g} s: "
            f"{_ranks(missing)} missing",
            "Their host or their process did not start, or cannot reach "
            f"{place.master_addr}:{place.master_port}: onehour doctor --hostfile F",
        ) from None
    return store


def hosts_of(store: dist.Store, ranks: Sequence[int]) -> list[str]:
    """The hosts of ranks that have met at a store."""
    return [host.decode() for host in store.multi_get([_host_key(rank) for rank in ranks])]


def connect(place: Rendezvous, timeout: timedelta = STORE_TIMEOUT, *, first: bool = False) -> dist.Store:
    """One more connection to the store.

    Args:
        place: see `meet`.
        timeout: of every later wait for a key; and of connecting, where it is shorter than `JOIN_TIMEOUT`.
        first: whether the store is to be opened here; torchrun's agents have one open already.

    Raises:
        RankError: nobody answers there, or it cannot be opened.
    """
    opens = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = min(timeout, JOIN_TIMEOUT)
    try:
        if not opens:
            _wait_for_port(place, patience)
        store = dist.TCPStore(
            place.master_addr, place.master_port, is_master=opens, timeout=patience, wait_for_workers=False
        )
    except (RuntimeError, OSError) as error:  # torch's DistNetworkError is a RuntimeError
        raise _nobody_there(place, patience, error) from None
    store.set_timeout(timeout)
    # an agent's store outlives a restart of its ranks
    return dist.PrefixStore(f"onehour/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def choose_interface(place: Rendezvous) -> None:
    """Tell gloo and NCCL by which network interface this host reaches rank 0, where the user has not.

    Left alone, gloo takes the address that the host's own name has, which Debian makes 127.0.1.1; and one variable for
    all hosts is wrong where their interfaces have different names.
    """
    if place.local_size == place.size:
        return
    interface = interface_towards(place.master_addr, place.master_port)
    if interface is None:  # rank 0's own host may know itself by 127.0.1.1
        with contextlib.suppress(UserError):
            interface = interface_towards(ELSEWHERE, place.master_port)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def _host_key(rank: int) -> str:
    return f"host/{rank}"


def _wait_for_port(place: Rendezvous, timeout: timedelta) -> None:
    """Wait until the store answers; torch's own waiting takes up to two minutes longer than it is given.

    Raises:
        OSError: it does not, or the name is unknown.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((place.master_addr, place.master_port), ATTEMPT_SECONDS).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        # thousands of ranks must not all come at once
        time.sleep(random.uniform(*PAUSE_SECONDS))


def _nobody_there(place: Rendezvous, timeout: timedelta, error: Exception) -> RankError:
    where = f"{place.master_addr}:{place.master_port}"
    if place.rank == 0:
        return RankError(
            f"{where}: rank 0 cannot open the port that the ranks meet at: {str(error).splitlines()[0]}",
            "Another training may be using it: give this one another --master_port.",
        )
    return RankError(
        f"{where}: rank {place.rank} on {socket.gethostname()} does not reach rank 0 there within "
        f"{timeout.total_seconds():g} s",
        "Is the address one that this host can reach (--master_addr), and no firewall between them? "
        "onehour doctor --hostfile F",
    )


def _ranks(missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8:,} more" if len(missing) > 8 else "")
    return f"rank{'s' * (len(missing) != 1)} {shown} {'is' if len(missing) == 1 else 'are'}"
