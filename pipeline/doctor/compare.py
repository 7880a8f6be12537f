"""What differs between hosts and would make them fail, or train different things: pure functions of their facts.

Where hosts differ, what most of them have is taken for right, else what the first host has.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.doctor.facts import Facts
from pipeline.doctor.finding import Finding, Verdict, worst
from pipeline.rungs import MENDS, NAMES, RUNGS

CLOCK_SECONDS = 2.0
"""That a host's clock may be off: leases, logs and file times are compared between hosts."""

NETWORK_CARDS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
MAY_DIFFER = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG_FILE")
HARMLESS = ("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "NCCL_DEBUG")
"""Variables that cost time at most where they differ."""

Differences = Callable[[Facts, Facts, str], Iterator[Finding]]


@dataclass(frozen=True)
class Check:
    """One row of the page.

    Attributes:
        about: what was looked at.
        found: the findings by host; a host that was not looked at is not there.
    """

    about: str
    found: Mapping[str, Sequence[Finding]]

    @property
    def verdict(self) -> Verdict:
        """The worst of all hosts."""
        return worst([finding for findings in self.found.values() for finding in findings])


def reference(values: Mapping[str, Hashable]) -> str:
    """The host whose value is taken for right: the first that has the most common one, ties to the earliest host."""
    counts = Counter(values.values())  # in the order of the hosts, which max keeps
    most = max(counts, key=counts.__getitem__)
    return next(host for host, value in values.items() if value == most)


def compare(facts: Mapping[str, Facts], slots: Mapping[str, Sequence[int]]) -> list[Check]:
    """The checks that come of all hosts' facts.

    Args:
        facts: by host, in the hostfile's order.
        slots: the numbers of the slots that are used, by host.
    """
    # how many threads decode depends on the ranks of a host, which it does not know
    own = {about: _own(facts, about) for about in _abouts(facts) if about != "threads"}
    compared = {
        "versions": _versions(facts),
        "code": _code(facts),
        "configuration": _configuration(facts),
        "slots": _slots(facts, slots),
        "environment": _environment(facts),
        "decode": _decoder(facts),
        "shards": _shards(facts, "index"),
        "crop index": _shards(facts, "crop indexes"),
    }
    order = [*compared, *(about for about in own if about not in compared)]
    checks = []
    for about in order:
        found = {
            host: [*own.get(about, {}).get(host, ()), *compared.get(about, {}).get(host, ())]
            for host in facts
            if host in own.get(about, {}) or host in compared.get(about, {})
        }
        if found:
            checks.append(Check(about, found))
    return checks


def clocks(offsets: Mapping[str, tuple[float, float]]) -> dict[str, list[Finding]]:
    """Hosts whose clock is off from the middle one of all clocks, the launching side's among them.

    Args:
        offsets: between which seconds a host's clock is ahead of the launching side's, by host. It was read at some
            moment of a round trip: the offset is known to that length.
    """
    middles = {host: (low + high) / 2 for host, (low, high) in offsets.items()}
    usual = statistics.median_low([*middles.values(), 0.0])
    found = {}
    for host, (low, high) in offsets.items():
        ahead = max(low - usual, 0) or min(high - usual, 0)  # the least that it can be
        if abs(ahead) <= CLOCK_SECONDS:
            found[host] = [Finding("clock", "good", f"within {CLOCK_SECONDS:g} s")]
            continue
        off = middles[host] - usual
        text = f"{abs(off):,.1f} s {'ahead of' if off > 0 else 'behind'} the other hosts"
        found[host] = [Finding("clock", "wrong", text, ("Set it: timedatectl set-ntp true, or run chronyd there.",))]
    return found


def shared_folder(seen: Mapping[str, Sequence[str]], facts: Mapping[str, Facts]) -> dict[str, list[Finding]]:
    """Whether the hosts have one run folder.

    Args:
        seen: whose marks each host sees where the run will write, by host.
        facts: by host.
    """
    right = reference({host: frozenset(others) for host, others in seen.items()})
    found = {}
    for host, others in seen.items():
        unwritable = facts[host].unwritable
        if right in others or facts[right].unwritable:
            found[host] = [Finding("run folder", "good", "shared")] if not unwritable else []
        else:
            text = f"{facts[host].place} is not shared: what {right} writes there is not seen here"
            mend = "recipe.run (or --run) must be in a folder that all hosts share, e.g. on NFS, at the same path."
            found[host] = [Finding("run folder", "wrong", text, (mend,))]
    return found


def _abouts(facts: Mapping[str, Facts]) -> list[str]:
    abouts = [about for fact in facts.values() for about, _ in _named(fact)]
    return list(dict.fromkeys(abouts))


def _named(fact: Facts) -> Iterator[tuple[str, Finding]]:
    about = ""
    for finding in fact.findings:
        about = finding.about or about  # one without a name goes on with the one before
        yield about, finding


def _own(facts: Mapping[str, Facts], about: str) -> dict[str, list[Finding]]:
    found = {host: [finding for name, finding in _named(fact) if name == about] for host, fact in facts.items()}
    return {host: findings for host, findings in found.items() if findings}


def _differing(
    facts: Mapping[str, Facts], value: Callable[[Facts], Any], differences: Differences
) -> dict[str, list[Finding]]:
    """What the hosts have that differ from the right one; those without a value are left out."""
    values = {host: repr(value(fact)) for host, fact in facts.items() if value(fact) is not None}
    if not values:
        return {}
    right = reference(values)
    return {
        host: [] if text == values[right] else list(differences(facts[host], facts[right], right))
        for host, text in values.items()
    }


def _versions(facts: Mapping[str, Facts]) -> dict[str, list[Finding]]:
    def value(fact: Facts) -> dict[str, str]:
        # what a slower decoder would be matters to no number where it does not decode
        return {
            name: number
            for name, number in sorted(fact.versions.items())
            if name != "simplejpeg" or fact.decoder == "simplejpeg"
        }

    def differences(mine: Facts, other: Facts, right: str) -> Iterator[Finding]:
        for name in dict.fromkeys((*value(other), *value(mine))):
            here, there = mine.versions.get(name, "none"), other.versions.get(name, "none")
            if here != there:
                mend = "The same environment on every host: pip install -r requirements.lock, or one shared folder."
                yield Finding("versions", "wrong", f"{name} {here}, {right} has {there}", (mend,))

    return _differing(facts, value, differences)


def _code(facts: Mapping[str, Facts]) -> dict[str, list[Finding]]:
    def differences(mine: Facts, other: Facts, right: str) -> Iterator[Finding]:
        files = _unequal(mine.code, other.code)
        text = f"{_some(files)} differ{'s' * (len(files) == 1)} from {right}'s"
        mend = "The same checkout on every host: git status there, then git pull; or one shared folder."
        yield Finding("code", "wrong", text, (mend,))

    return _differing(facts, lambda fact: sorted(fact.code.items()), differences)


def _configuration(facts: Mapping[str, Facts]) -> dict[str, list[Finding]]:
    def differences(mine: Facts, other: Facts, right: str) -> Iterator[Finding]:
        assert mine.configuration is not None and other.configuration is not None
        for key in _unequal(mine.configuration, other.configuration)[:3]:
            here, there = mine.configuration.get(key, "not set"), other.configuration.get(key, "not set")
            text = f"{key} is {here}, on {right} {there}"
            yield Finding("configuration", "wrong", text, (f"The same file on every host: copy it from {right}.",))

    return _differing(facts, lambda f: f.configuration and sorted(f.configuration.items()), differences)


def _slots(facts: Mapping[str, Facts], slots: Mapping[str, Sequence[int]]) -> dict[str, list[Finding]]:
    with_gpus = [host for host, fact in facts.items() if fact.gpus]
    found: dict[str, list[Finding]] = {}
    for host, fact in facts.items():
        used = slots[host]
        if fact.gpus is None:
            continue  # is among its own findings
        if not fact.gpus and with_gpus:
            text = f"no GPU is found here, {with_gpus[0]} has {len(facts[with_gpus[0]].gpus or ())}"
            mends = ("nvidia-smi -L must list them over ssh too; for ranks on the CPU: DS_ACCELERATOR=cpu everywhere",)
            found[host] = [Finding("slots", "wrong", text, mends)]
        elif not fact.gpus:
            text = f"{len(used)} rank{'s' * (len(used) != 1)} on the CPU: there is no GPU"
            found[host] = [Finding("slots", "good", text)]
        elif max(used) >= len(fact.gpus):
            number = len(fact.gpus)
            text = (
                f"slot {max(used)} is used, and there {'is' if number == 1 else 'are'} {number} GPU{'s'[: number > 1]}"
            )
            found[host] = [Finding("slots", "wrong", text, (f"Write slots={number} for {host} into the hostfile.",))]
        else:
            found[host] = [Finding("slots", "good", f"{len(used)} of {len(fact.gpus)} GPUs")]
    return found


def _environment(facts: Mapping[str, Facts]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {host: list(_own_environment(fact)) for host, fact in facts.items()}
    for name in sorted({name for fact in facts.values() for name in fact.environment}):
        if name in MAY_DIFFER or name == "PYTHONDONTWRITEBYTECODE":
            continue
        values = {host: fact.environment.get(name) for host, fact in facts.items()}
        right = reference(values)
        for host, value in values.items():
            if value != values[right]:
                here, there = (f"{name}={v}" if v is not None else f"no {name}" for v in (value, values[right]))
                verdict: Verdict = "slow" if name in HARMLESS else "wrong"
                mend = "Look into ~/.bashrc, ~/.ssh/environment, /etc/environment and sshd_config there."
                found[host].append(Finding("environment", verdict, f"{here}, {right} has {there}", (mend,)))
    return found


def _own_environment(fact: Facts) -> Iterator[Finding]:
    for name in NETWORK_CARDS:
        value = fact.environment.get(name)
        if value is not None and not _names_one(value, fact.interfaces, prefixes=name.startswith("NCCL")):
            there = ", ".join(f"{card} ({' '.join(addresses)})" for card, addresses in fact.interfaces.items())
            text = f"{name}={value}, and the network cards here are {there or 'none'}"
            mend = "Unset it (each rank finds its card by itself), or name the card of this host."
            yield Finding("environment", "wrong", text, (mend,))
    if "PYTHONDONTWRITEBYTECODE" in fact.environment:
        text = "PYTHONDONTWRITEBYTECODE is set: every rank compiles thousands of modules again"
        yield Finding("environment", "slow", text, ("Unset it there.",))
    if fact.own_address is not None and fact.own_address.startswith("127.") and not fact.gpus:
        text = f"{fact.name} is {fact.own_address} to itself, where no other host reaches it"
        mend = "Take its name out of that line of /etc/hosts there: what goes by the name, not by the network, fails."
        yield Finding("environment", "slow", text, (mend,))


def _names_one(value: str, interfaces: Mapping[str, Sequence[str]], *, prefixes: bool) -> bool:
    """Whether a variable names a network card that is there; NCCL takes beginnings, =name, and ^ for all but."""
    if prefixes and value.startswith("^"):
        excluded = tuple(value[1:].lstrip("=").split(","))
        return any(not card.startswith(excluded) for card in interfaces)
    exact = not prefixes or value.startswith("=")
    names = value.lstrip("=").split(",")
    if exact:
        return all(name in interfaces for name in names) if not prefixes else any(name in interfaces for name in names)
    return any(card.startswith(tuple(names)) for card in interfaces)


def _decoder(facts: Mapping[str, Facts]) -> dict[str, list[Finding]]:
    def differences(mine: Facts, other: Facts, right: str) -> Iterator[Finding]:
        assert mine.decoder is not None and other.decoder is not None
        common = max(mine.decoder, other.decoder, key=RUNGS.index)
        mends = [f"Or name one that every host has: --set recipe.loader.decoder={common}"]
        if other.decoder != common and mine.decoder == common:
            mends.insert(0, f"Give that host the other's decoder: {MENDS[other.decoder][0]}")
        text = f"{NAMES[mine.decoder]}, {right} has {NAMES[other.decoder]}: their pixels differ by rounding"
        yield Finding("decode", "wrong", text, tuple(mends))

    return _differing(facts, lambda fact: fact.decoder, differences)


def _shards(facts: Mapping[str, Facts], what: str) -> dict[str, list[Finding]]:
    def value(fact: Facts) -> list[tuple[str, Any]] | None:
        return [(name, split[what]) for name, split in fact.shards.items()] or None

    def differences(mine: Facts, other: Facts, right: str) -> Iterator[Finding]:
        for name in other.shards.keys() & mine.shards.keys():
            here, there = mine.shards[name][what], other.shards[name][what]
            if here == there:
                continue
            if what == "index":
                mend = f"Copy the shards from {right}, then there: shards verify DIR"
                yield Finding("shards", "wrong", f"{name}: index {here}, {right} has {there}", (mend,))
            else:
                mend = "Make them there: shards index DIR --decode"
                yield Finding("crop index", "slow", f"{name}: for {here} shards, {right} for {there}", (mend,))

    return _differing(facts, value, differences)


def _unequal(mine: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [key for key in dict.fromkeys((*other, *mine)) if mine.get(key) != other.get(key)]


def _some(names: Sequence[str], most: int = 3) -> str:
    """A few names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
