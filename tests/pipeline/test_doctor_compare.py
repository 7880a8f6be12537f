"""What the doctor makes of hosts that differ: each fault, its line, and its mend; from facts alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, replace

import pytest

from pipeline.doctor import facts as telling
from pipeline.doctor import page
from pipeline.doctor.allreduce import rounds_of_pairs
from pipeline.doctor.compare import Check, clocks, compare, reference, shared_folder
from pipeline.doctor.facts import Facts
from pipeline.doctor.finding import Finding
from pipeline.doctor.network import meeting

FINE = Facts(
    name="a",
    findings=(Finding("versions", "good", "python 3.12.1"), Finding("decode", "good", "C extension, AVX2")),
    versions={"python": "3.12.1", "torch": "2.8.0", "simplejpeg": "1.8"},
    code={"pipeline/order.py": "11", "pipeline/plan.py": "22"},
    configuration={"train_batch_size": "64", "recipe.model.name": '"resnet50"'},
    gpus=[],
    interfaces={"eth0": ["10.0.0.1"]},
    own_address="10.0.0.1",
    decoder="native",
    shards={"train": {"index": "5f0c", "crop indexes": 4}, "val": {"index": "9a11", "crop indexes": 2}},
    place="/shared",
    marker="t-a",
)
SLOTS = {name: [0, 1] for name in "abc"}


def cluster(**changes: object) -> dict[str, Facts]:
    """Three hosts, the last of which is otherwise."""
    hosts = {name: replace(FINE, name=name) for name in "abc"}
    hosts["c"] = replace(hosts["c"], **changes)  # type: ignore[arg-type]
    return hosts


def odd(facts: Mapping[str, Facts], slots: Mapping[str, list[int]] = SLOTS) -> list[tuple[str, str, str, str, str]]:
    """What is not good: check, host, verdict, text, mend."""
    return [
        (check.about, host, finding.verdict, finding.text, "\n".join(finding.mend))
        for check in compare(facts, slots)
        for host, findings in check.found.items()
        for finding in findings
        if finding.verdict != "good"
    ]


def test_equal_hosts_are_fine():
    assert odd(cluster()) == []


FAULTS = [
    ("versions", {"versions": {**FINE.versions, "torch": "2.9.1"}}, "torch 2.9.1, a has 2.8.0", "requirements.lock"),
    ("versions", {"versions": {"python": "3.12.1"}}, "torch none, a has 2.8.0", "requirements.lock"),
    ("code", {"code": {**FINE.code, "pipeline/order.py": "12"}}, "pipeline/order.py differs from a's", "git pull"),
    ("code", {"code": {}}, "pipeline/order.py, pipeline/plan.py differ from a's", "git pull"),
    (
        "configuration",
        {"configuration": {"train_batch_size": "32", "recipe.model.name": '"resnet50"'}},
        "train_batch_size is 32, on a 64",
        "copy it from a",
    ),
    ("slots", {"gpus": [0]}, "slot 1 is used, and there is 1 GPU", "slots=1 for c"),
    ("decode", {"decoder": "simplejpeg"}, "simplejpeg, a has C extension", "recipe.loader.decoder=simplejpeg"),
    (
        "shards",
        {"shards": {**FINE.shards, "val": {"index": "91aa", "crop indexes": 2}}},
        "val: index 91aa, a has 9a11",
        "shards verify",
    ),
    ("environment", {"environment": {"GLOO_SOCKET_IFNAME": "eth7"}}, "eth7, and the network cards here are", "Unset"),
    ("environment", {"environment": {"NCCL_SOCKET_IFNAME": "=eth"}}, "NCCL_SOCKET_IFNAME==eth", "Unset"),
    ("environment", {"environment": {"NCCL_ALGO": "Ring"}}, "NCCL_ALGO=Ring, a has no NCCL_ALGO", "bashrc"),
]


@pytest.mark.parametrize(("about", "changes", "text", "mend"), FAULTS, ids=[f"{f[0]}-{f[2][:20]}" for f in FAULTS])
def test_one_host_that_is_otherwise(about: str, changes: dict, text: str, mend: str):
    found = [line for line in odd(cluster(**changes)) if line[0] == about]
    # a host with a GPU makes those without one odd, too
    found = [line for line in found if line[1] == "c"]
    ((_, _, verdict, said, help_text),) = found
    assert verdict == "wrong" and text in said and mend in help_text


def test_gpus_on_some_hosts_only():
    hosts = cluster(gpus=[])
    hosts["a"], hosts["b"] = replace(hosts["a"], gpus=[0, 1]), replace(hosts["b"], gpus=[0, 1])
    ((about, host, verdict, text, mend),) = odd(hosts)
    assert (about, host, verdict) == ("slots", "c", "wrong")
    assert "no GPU is found here, a has 2" in text and "nvidia-smi" in mend
    assert odd(cluster(gpus=[0, 1])) != [] and odd({"c": replace(FINE, gpus=[0, 1])}, {"c": [1]}) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"environment": {"OMP_NUM_THREADS": "8"}}, "OMP_NUM_THREADS=8, a has no OMP_NUM_THREADS"),
        ({"environment": {"PYTHONDONTWRITEBYTECODE": "1"}}, "compiles thousands of modules"),
        ({"own_address": "127.0.1.1"}, "c is 127.0.1.1 to itself"),
        ({"shards": {**FINE.shards, "train": {"index": "5f0c", "crop indexes": 3}}}, "train: for 3 shards, a for 4"),
    ],
)
def test_what_costs_time_is_no_mistake(changes: dict, text: str):
    ((_, host, verdict, said, mend),) = odd(cluster(**changes))
    assert (host, verdict) == ("c", "slow") and text in said and mend


@pytest.mark.parametrize(
    "environment",
    [
        {"GLOO_SOCKET_IFNAME": "eth0"},
        {"NCCL_SOCKET_IFNAME": "eth"},
        {"NCCL_SOCKET_IFNAME": "=eth0,eth1"},
        {"NCCL_SOCKET_IFNAME": "^lo,docker"},
    ],
)
def test_a_network_card_that_is_there(environment: dict[str, str]):
    assert odd(cluster(environment=environment)) == []


def test_a_slower_decoder_s_version_matters_only_where_it_decodes():
    versions = {**FINE.versions, "simplejpeg": "1.7"}
    assert odd(cluster(versions=versions)) == []
    hosts = {name: replace(fact, decoder="simplejpeg") for name, fact in cluster(versions=versions).items()}
    assert [line[0] for line in odd(hosts)] == ["versions"]


def test_most_hosts_are_right_else_the_first():
    assert reference({"a": 1, "b": 2, "c": 2}) == "b"
    assert reference({"a": 1, "b": 2}) == "a"
    hosts = cluster()
    hosts["a"] = replace(hosts["a"], versions={**FINE.versions, "torch": "2.9.1"})
    ((about, host, _, text, _),) = odd(hosts)
    assert (about, host, text) == ("versions", "a", "torch 2.9.1, b has 2.8.0")


def test_a_host_s_own_findings_keep_their_mends():
    mistake = Finding("shards", "wrong", "/data: there is no index.json", ("shards index /data",))
    hosts = cluster(findings=(*FINE.findings, mistake, Finding("", "slow", "goes on")), shards={})
    assert [line[:4] for line in odd(hosts)] == [
        ("shards", "c", "wrong", mistake.text),
        ("shards", "c", "slow", "goes on"),
    ]
    assert odd(hosts)[0][4] == "shards index /data"


def test_clocks_are_compared_with_the_middle_one_of_all():
    two = clocks({"a": (-0.1, 0.1), "b": (-90.2, -89.8)})
    assert [two[host][0].verdict for host in "ab"] == ["good", "wrong"], "this machine's clock decides between two"
    assert all(found[0].verdict == "good" for found in clocks({"a": (99.9, 100.1), "b": (99, 101.9)}).values())
    found = clocks({"a": (-0.1, 0.1), "b": (-3600.2, -3599.8), "c": (-0.3, 0.2)})
    assert [found[host][0].verdict for host in "abc"] == ["good", "wrong", "good"]
    assert found["b"][0].text.startswith("3,599.9") or found["b"][0].text.startswith("3,600.0")
    assert "behind" in found["b"][0].text and "timedatectl" in found["b"][0].mend[0]
    # where ssh took long, a clock that may be right is not accused
    assert clocks({"a": (-0.1, 0.1), "b": (-1, 7)})["b"][0].verdict == "good"
    assert clocks({"a": (-0.1, 0.1), "b": (2.2, 3)})["b"][0].verdict == "wrong"


def test_a_run_folder_that_is_not_shared():
    hosts = cluster()
    everyone = {"a": ["a", "b", "c"], "b": ["a", "b", "c"], "c": ["a", "b", "c"]}
    assert all(found[0].verdict == "good" for found in shared_folder(everyone, hosts).values())
    found = shared_folder({"a": ["a", "b"], "b": ["a", "b"], "c": ["c"]}, hosts)
    assert [found[host][0].verdict for host in "abc"] == ["good", "good", "wrong"]
    assert "what a writes there is not seen here" in found["c"][0].text and "NFS" in found["c"][0].mend[0]
    unwritable = shared_folder({"a": ["a", "b"], "b": ["a", "b"], "c": ["a", "b"]}, cluster(unwritable="no space"))
    assert unwritable["c"] == [], "it is shared; that it cannot be written is another finding"


def two_networks() -> dict[str, Facts]:
    hosts = cluster()
    hosts["a"] = replace(hosts["a"], interfaces={"eth1": ["192.168.0.1"], "ib0": ["10.0.0.1"]})
    for number, name in enumerate("bc", start=2):
        hosts[name] = replace(hosts[name], interfaces={f"ib{number}": [f"10.0.0.{number}"]})
    return hosts


def test_the_address_that_every_host_reaches_and_the_cards_at_both_ends():
    out = {"error": "timed out"}
    tried = {
        "b": {"192.168.0.1": out, "10.0.0.1": {"from": "10.0.0.2"}},
        "c": {"192.168.0.1": {"from": "192.168.0.3"}, "10.0.0.1": {"from": "10.0.0.3"}},
    }
    met = meeting(two_networks(), tried, 29500)
    assert met.address == "10.0.0.1"
    assert [found[0].text for found in met.found.values()] == [
        "10.0.0.1 on ib0",
        "reaches a at 10.0.0.1 over ib2",
        "reaches a at 10.0.0.1 over ib3",
    ]
    tried["c"]["10.0.0.1"] = out
    met = meeting(two_networks(), tried, 29500)
    assert met.address is None and met.found["b"][0].verdict == "wrong"
    assert "one network" in met.found["b"][0].mend[0]
    tried["c"]["192.168.0.1"], tried["b"]["10.0.0.1"] = out, {"from": "10.0.0.2"}
    met = meeting(two_networks(), tried, 29500)
    assert met.found["b"][0].verdict == "good" and met.found["c"][0].verdict == "wrong"
    assert "192.168.0.1: timed out" in met.found["c"][0].text and "TCP port 29500" in met.found["c"][0].mend[0]


def test_a_first_host_without_a_network():
    hosts = cluster()
    hosts["a"] = replace(hosts["a"], interfaces={})
    met = meeting(hosts, {"b": {}, "c": {}}, 29500)
    assert met.address is None and met.found["a"][0].verdict == "wrong"


def test_facts_survive_their_way_among_what_a_login_script_prints(capsys: pytest.CaptureFixture):
    telling.say(asdict(FINE))
    printed = "Welcome to node-1!\n" + capsys.readouterr().out + "bye\n"
    assert Facts.read(telling.heard(printed)) == FINE
    assert telling.heard("node-0: " + telling.MARK + json.dumps([1])) == [1], "as pdsh prints it"
    assert telling.heard("nothing of the kind") is None and telling.heard(telling.MARK + "%N") is None


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9, 15, 16])
def test_every_pair_of_hosts_is_measured_once(number: int):
    rounds = rounds_of_pairs(number)
    assert sorted(itertools.chain(*rounds)) == list(itertools.combinations(range(number), 2))
    for pairs in rounds:
        members = list(itertools.chain(*pairs))
        assert len(set(members)) == len(members)


def test_of_many_hosts_each_is_measured_with_some():
    rounds = rounds_of_pairs(256)
    met = [sum(member in pair for pairs in rounds for pair in pairs) for member in range(256)]
    assert len(rounds) == 16 and set(met) == {16}


def test_a_few_hosts_are_columns_and_many_are_counted():
    hosts = {f"node-{number}": replace(FINE, name=f"node-{number}") for number in range(256)}
    for number in (3, 5, 7, 9, 11):
        hosts[f"node-{number}"] = replace(FINE, versions={**FINE.versions, "torch": "2.9.1"})
    few = {host: hosts[host] for host in list(hosts)[:4]}
    text = page.cluster(list(few), compare(few, {host: [0] for host in few}), [])
    assert text.splitlines()[0].split() == list(few)
    row = next(line for line in text.splitlines() if line.startswith("versions"))
    assert row.split() == ["versions", "✓", "✓", "✓", "✗"]
    assert "✗ node-3: torch 2.9.1, node-0 has 2.8.0" in text and text.endswith(
        "1 problem; training would fail or differ."
    )
    text = page.cluster(list(hosts), compare(hosts, {host: [0] for host in hosts}), [])
    row = next(line for line in text.splitlines() if line.startswith("versions"))
    assert "251 hosts ✓" in row and "5 hosts ✗" in row
    assert "✗ node-3, node-5, node-7, node-9 and 1 more: torch 2.9.1, node-0 has 2.8.0" in text
    assert text.endswith("1 problem; training would fail or differ."), "what five hosts have alike is one"
    assert len(text.splitlines()) < 20


def test_hosts_that_were_not_looked_at_and_what_is_about_all():
    checks = [Check("ssh", {"a": [Finding("ssh", "good", "yes")], "b": [Finding("ssh", "wrong", "no", ("do",))]})]
    checks.append(Check("code", {"a": []}))
    text = page.cluster(["a", "b"], checks, [Finding("all-reduce", "slow", "skipped: ssh first")])
    code = next(line for line in text.splitlines() if line.startswith("code"))
    assert code.split() == ["code", "✓", "–"]
    assert "✗ b: no" in text and "→ do" in text and "skipped: ssh first" in text
