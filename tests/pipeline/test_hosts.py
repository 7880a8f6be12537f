"""Hostfiles and filters: what the launcher would do, and its traps as errors before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import hosts
from shards.errors import UserError

SLOTS = {"a": 4, "b": 2, "worker-2": 8}


@pytest.fixture(scope="module")
def runner():
    """DeepSpeed's launcher, whose own functions are the reference."""
    from deepspeed.launcher import runner

    return runner


def write(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        hosts.read_hostfile(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("worker-0 slots=8\n", {"worker-0": 8}),
        ("b slots=2\na slots=16", {"b": 2, "a": 16}),
        ("# comment\n\n  a slots=4  \n\t\nb\tslots=4\n", {"a": 4, "b": 4}),
        ("a   slots=1 # the old one\n", {"a": 1}),
        ("10.0.0.1 slots=8\nfe80::1 slots=8\n", {"10.0.0.1": 8, "fe80::1": 8}),
        ("a slots=4\r\nb slots=2\r\n", {"a": 4, "b": 2}),
    ],
)
def test_hostfile_reads_as_by_the_launcher(tmp_path, runner, text, slots):
    path = write(tmp_path, text)
    assert hosts.read_hostfile(path) == slots
    assert list(hosts.read_hostfile(path).items()) == list(runner.fetch_hostfile(str(path)).items()), "and its order"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "", "names no host"),
        ("# nobody\n\n", "", "names no host"),
        ("a\n", ":1", "'a' is not of the form: host slots=N"),
        ("a slots=2\nb:2\n", ":2", "'b:2' is not of the form"),
        ("a slots = 2\n", ":1", "is not of the form"),
        ("a slots=two\n", ":1", "is not of the form"),
        ("a slots=-1\n", ":1", "is not of the form"),
        ("a, b\n", ":1", "'a, b' is not of the form"),
        ("slots=2\n", ":1", "is not of the form"),
        ("a slots=2,b slots=2\n", ":1", "is not of the form"),
        ("a slots=2 b slots=2\n", ":1", "is not of the form"),
        ("a slots=2x\n", ":1", "is not of the form"),
        ("# x\na slots=2\n\na slots=4\n", ":4", "a is listed twice"),
        ("a slots=2\nb slots=0\n", ":2", "b has no slots"),
    ],
)
def test_traps_of_a_hostfile_are_errors_at_their_line(tmp_path, text, where, what):
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}{where}: ")
    assert what in message


def test_missing_hostfile_is_an_error_where_the_launcher_would_train_locally(tmp_path, runner):
    path = tmp_path / "typo"
    assert runner.fetch_hostfile(str(path)) is None
    message = refusal(path)
    assert "there is no such hostfile" in message
    assert "worker-0 slots=8" in message


def test_folder_or_binary_hostfile_is_an_error(tmp_path):
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refusal(tmp_path / "binary")


HOST_LINES = st.lists(
    st.one_of(
        st.builds("{} slots={}".format, st.sampled_from(["a", "b", "c", "n-1"]), st.integers(0, 9)),
        st.sampled_from(["", "#", "# a slots=1", "a", "  b slots=3  ", "c\tslots=2", "d slots=2 # two", "e slots= 2"]),
        st.text("ab =slot#0123\t", max_size=12),
    ),
    max_size=6,
)


@given(lines=HOST_LINES)
@settings(max_examples=150, deadline=None)
def test_whatever_is_accepted_reads_as_by_the_launcher(tmp_path_factory, runner, lines):
    path = tmp_path_factory.getbasetemp() / "any-hostfile"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        ours = hosts.read_hostfile(path)
    except UserError:
        return
    assert list(ours.items()) == list(runner.fetch_hostfile(str(path)).items())


# ---------------------------------------------------------------- the filters


def launchers_choice(runner, include: str, exclude: str) -> list[tuple[str, list[int]]]:
    chosen = runner.parse_inclusion_exclusion(SLOTS, include, exclude)
    return [(host, sorted(slots)) for host, slots in chosen.items()]


def our_choice(include: str, exclude: str) -> list[tuple[str, list[int]]]:
    return [(host, sorted(slots)) for host, slots in hosts.select(SLOTS, include, exclude).items()]


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ("", "", {"a": [0, 1, 2, 3], "b": [0, 1], "worker-2": [0, 1, 2, 3, 4, 5, 6, 7]}),
        ("a", "", {"a": [0, 1, 2, 3]}),
        ("worker-2@b", "", {"b": [0, 1], "worker-2": [0, 1, 2, 3, 4, 5, 6, 7]}),
        ("a:0,2@b:1", "", {"a": [0, 2], "b": [1]}),
        ("a:3,1", "", {"a": [1, 3]}),
        ("", "a", {"b": [0, 1], "worker-2": [0, 1, 2, 3, 4, 5, 6, 7]}),
        ("", "a:0,2@worker-2", {"a": [1, 3], "b": [0, 1]}),
        ("", "b:0,1@a:1", {"a": [0, 2, 3], "worker-2": [0, 1, 2, 3, 4, 5, 6, 7]}),
    ],
)
def test_filter_chooses_what_the_launcher_chooses(runner, include, exclude, chosen):
    assert our_choice(include, exclude) == list(chosen.items())
    assert launchers_choice(runner, include, exclude) == list(chosen.items())


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("a", "b", ["--include and --exclude cannot be used together"]),
        ("c", "", ["--include c: c is not in the hostfile", "It has a, b, worker-2."]),
        ("", "c:0", ["--exclude c:0: c is not in the hostfile"]),
        ("b:2", "", ["--include b:2: b has slots 0 to 1, not 2"]),
        ("", "b:7", ["--exclude b:7: b has slots 0 to 1, not 7"]),
        ("b:-1", "", ["b has slots 0 to 1, not -1"]),
        ("b:x", "", ["slots are numbers: b:0,1"]),
        ("b:", "", ["--include b:", "slots are numbers"]),
        ("b:0,", "", ["slots are numbers"]),
        ("b:0:1", "", ["slots are numbers"]),
        ("", "a@b@worker-2", ["--exclude a@b@worker-2: no slot is left to train on"]),
        ("@", "", ["--include @"]),
        ("a@@b", "", ["--include a@@b"]),
    ],
)
def test_filter_that_cannot_be_applied_is_refused(include, exclude, expected):
    with pytest.raises(UserError) as caught:
        hosts.select(SLOTS, include, exclude)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("text", ["a:0@a:1", "a:0,0", "a:1@a", "a@a:1", "b:0@a:2@b:1"])
def test_repeated_host_or_slot_counts_as_by_the_launcher_or_is_refused(runner, option, text):
    filters = (text, "") if option == "include" else ("", text)
    try:
        ours = our_choice(*filters)
    except UserError:
        return
    assert ours == launchers_choice(runner, *filters), "another number of ranks than planned would start"


FILTERS = st.lists(
    st.builds(
        lambda host, slots: host + (":" + ",".join(map(str, slots)) if slots else ""),
        st.sampled_from(["a", "b", "worker-2", "c"]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    min_size=1,
    max_size=4,
).map("@".join)


@given(text=FILTERS, include=st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_filter_is_accepted_chooses_what_the_launcher_chooses(runner, text, include):
    filters = (text, "") if include else ("", text)
    try:
        ours = our_choice(*filters)
    except UserError:
        return
    assert ours == launchers_choice(runner, *filters)


# ---------------------------------------------------------------- this machine


@pytest.fixture
def no_variables(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.mark.parametrize(
    ("visible", "gpus"), [("", []), ("-1", []), ("0", [0]), ("0,1,2", [0, 1, 2]), (" 5 , 4 ", [5, 4])]
)
def test_visible_devices_are_read(monkeypatch, no_variables, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hosts.local_gpus() == gpus


@pytest.mark.parametrize("visible", ["GPU-1234,GPU-5678", "MIG-1", "0,GPU-1", "0,-1", "0,", "0;1", "1,1"])
def test_visible_devices_that_the_launcher_cannot_take_are_refused(monkeypatch, no_variables, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError) as caught:
        hosts.local_gpus()
    assert str(caught.value).startswith(f"CUDA_VISIBLE_DEVICES={visible}: ")
    assert "1,1" in visible or "nvidia-smi -L" in str(caught.value)


def nvidia_smi(folder: Path, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_nvidia_smi_counts_the_gpus_and_its_absence_means_none(monkeypatch, no_variables, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hosts.local_gpus() == []
    nvidia_smi(tmp_path, 'echo "GPU 0: H100 (UUID: x)"\necho "  MIG 1g.10gb"\necho "GPU 1: H100 (UUID: y)"')
    assert hosts.local_gpus() == [0, 1]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert hosts.local_gpus() == []


def test_nvidia_smi_that_hangs_is_said(monkeypatch, no_variables, tmp_path, capsys):
    nvidia_smi(tmp_path, "exec sleep 20")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(hosts, "GPU_LISTING_SECONDS", 0.2)
    assert hosts.local_gpus() == []
    message = capsys.readouterr().err
    assert "no GPU is counted" in message and "timed out" in message and "CUDA_VISIBLE_DEVICES=0,1" in message


# ---------------------------------------------------------------- the launcher's options


def test_the_launchers_options_are_known(monkeypatch, runner):
    """All of the installed DeepSpeed's, but those that `onehour train` gives or that train nothing."""
    parsers = []
    monkeypatch.setattr(runner.argparse.ArgumentParser, "parse_args", lambda parser, args: parsers.append(parser))
    runner.parse_args([])
    by_name = {name: action for action in parsers[0]._actions for name in action.option_strings}
    not_ours_to_pass = {"-h", "--help", "--module", "--no_python", "--autotuning"}
    assert by_name.keys() - not_ours_to_pass == hosts.LAUNCHER_OPTIONS | hosts.LAUNCHER_FLAGS | hosts.OURS.keys()
    for name in hosts.LAUNCHER_FLAGS | hosts.LAUNCHER_OPTIONS:
        assert (by_name[name].nargs == 0) == (name in hosts.LAUNCHER_FLAGS), name
    assert set(hosts.LAUNCHERS) == runner.LAUNCHER_CLASSES.keys()


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ([], {}),
        (["--master_port", "29501"], {"--master_port": "29501"}),
        (["--master_port=29501", "-q"], {"--master_port": "29501", "-q": ""}),
        (["--launcher", "slurm", "--launcher_args", "--qos a"], {"--launcher": "slurm", "--launcher_args": "--qos a"}),
        (["--launcher_args=-p a=b", "--bind_cores_to_rank"], {"--launcher_args": "-p a=b", "--bind_cores_to_rank": ""}),
        (["--log_lev", "info"], {"--log_level": "info"}),
        (["--venv_script", "a=b"], {"--venv_script": "a=b"}),
    ],
)
def test_launchers_options_are_read(options, given):
    assert hosts.read_launcher_options(options) == given


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["lr=0.4"], "lr=0.4: .*Did you mean --set lr=0.4?"),
        (["--bind_cores_to_rank", "lr=0.4"], "Did you mean --set lr=0.4?"),
        (["--master_port", "1", "fast"], "fast: .*for the script to run"),
        (["--num_gpus", "2"], "--num_gpus: .*Use onehour's own --ranks"),
        (["--num_accelerators=2"], "--num_accelerators=2: .*--ranks"),
        (["--num_acc=2"], "--num_acc=2: .*--ranks"),
        (["--num_nodes", "2"], "own --include host-a@host-b"),
        (["--num_n=2"], "--include"),
        (["-H", "hosts"], "-H: .*--hostfile"),
        (["-Hhosts"], "-Hhosts: .*--hostfile"),
        (["--hostfile=hosts"], "--hostfile"),
        (["-i", "a"], "--include"),
        (["-e=a"], "--exclude"),
        (["-qH", "hosts"], "-qH: neither"),
        (["--num", "2"], "--num: neither"),
        (["--epochs", "5"], "--epochs: neither.*--set"),
        (["--module"], "neither"),
        (["--"], "neither"),
    ],
)
def test_options_that_would_change_the_plan_are_refused(options, expected):
    with pytest.raises(UserError, match="(?s)" + expected.replace("?", r"\?")):
        hosts.read_launcher_options(options)


# ---------------------------------------------------------------- other hosts


@pytest.fixture
def remote(monkeypatch, tmp_path) -> Path:
    """A working directory from where a launch with pdsh is possible, and a home."""
    for name in ("bin", "home", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "pdsh").write_text("")
    (tmp_path / "bin" / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    hosts.check_remote("pdsh", Path("ds_configs/demo.json"))
    return tmp_path


def remote_refusal(launcher: str = "pdsh", config: str = "x.json") -> str:
    with pytest.raises(UserError) as caught:
        hosts.check_remote(launcher, Path(config))
    return str(caught.value)


def test_pdsh_is_needed_only_where_it_is_the_launcher(remote):
    (remote / "bin" / "pdsh").unlink()
    assert "apt install pdsh" in remote_refusal() and "openmpi" in remote_refusal()
    hosts.check_remote("openmpi", Path("x.json"))


def test_launcher_that_does_not_exist(remote):
    assert remote_refusal("ssh").startswith("--launcher ssh: the launcher has pdsh, openmpi")


@pytest.mark.parametrize("name", ["two words", "$HOME", "a;b", "%h", "it's", "(1)"])
def test_paths_that_a_remote_shell_takes_apart(remote, monkeypatch, name):
    assert remote_refusal(config=f"{name}.json").startswith(f"{name}.json: ")
    hosts.check_remote("slurm", Path(f"{name}.json"))
    (remote / name).mkdir()
    monkeypatch.chdir(remote / name)
    assert "working directory" in remote_refusal()
