"""What `onehour train` hands to the deepspeed launcher, and how it stops it and its ranks."""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import cli, config, launch, launcher
from pipeline.experiment import overrides_of
from pipeline.fault import STOPPED, Fault
from pipeline.lease import Lease, LeaseView
from pipeline.metrics import FILE_NAME, read_metrics
from shards.errors import UserError
from shards.files import exclusive
from tests.conftest import kill_everything, processes_with

ROOT = Path(__file__).parents[2]
# everything that a shell takes apart, and a configuration may need
OVERRIDES = [
    "optimizer.params.lr=0.3",
    'recipe.model.args={"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 16]}',
    'recipe.model.name="resnet18"',
    'recipe.data="/data/it\'s $HOME `id` \\\\ %h ; * é"',
    "recipe.run=runs/{a,b}",
]


@pytest.fixture(scope="module")
def runner():
    """DeepSpeed's launcher, which the command line is made for."""
    from deepspeed.launcher import runner

    return runner


def arguments(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args(["experiment.json", *more])


def command_for(path: Path, ranks: launch.Ranks, overrides: list[str], options: list[str] | None = None) -> list[str]:
    """The launcher's own arguments, without the two words that start it."""
    experiment = config.Config(path=path, raw={}, blocks=None, recipe=None, overrides=tuple(overrides))
    command = launcher.command_line(experiment, ranks.world_size, [*ranks.options, *(options or [])], "token")
    assert command[0] == sys.executable and command[1].endswith("deepspeed")
    return command[2:]


# ---------------------------------------------------------------- what the ranks are told


def test_overrides_survive_pdsh_and_the_shell_of_every_host(runner, tmp_path, monkeypatch):
    """The command is joined as the launcher joins it for pdsh, and split by a real shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    from pipeline import train

    echo = tmp_path / "python"
    echo.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    echo.chmod(0o755)
    args = runner.parse_args(command_for(Path("ds_configs/demo.json"), launch.Ranks(2, [], "", 2), OVERRIDES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepspeed.launcher.multinode_runner.sys.executable", str(echo))
    args.launcher_args, args.master_addr = "", "10.0.0.1"
    command, _, _ = PDSHRunner(args, "e30=").get_cmd(dict(os.environ), {"a": [0, 1]})
    remote = " ".join(command[command.index("-w") + 2 :])
    said = subprocess.run(["bash", "-c", remote], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    said = said[said.index("pipeline.train") + 1 :]
    assert not set(" $%\"'{};*\\`") & set("".join(said)), "pdsh expands %h, a shell the rest"
    parsed = train._parse([*said, "--local_rank=1"])
    assert parsed.config == "ds_configs/demo.json" and parsed.expect_world_size == 2
    assert overrides_of(parsed) == OVERRIDES


def test_direct_overrides_come_after_the_launchers():
    from pipeline import train

    encoded = base64.urlsafe_b64encode(json.dumps(["a=1", "b=2"]).encode()).decode()
    parsed = train._parse(["x.json", "--set", "b=3", "--overrides-base64", encoded, "--run", "r"])
    assert overrides_of(parsed) == ["a=1", "b=2", "b=3", 'recipe.run="r"']


def test_launchers_options_pass_through(runner):
    options = ["--master_port", "1", "--launcher=slurm", "--launcher_args", "-p x", "--bind_cores_to_rank"]
    args = runner.parse_args(command_for(Path("x.json"), launch.Ranks(1, ["--master_port", "2"], "", 1), [], options))
    assert (args.master_port, args.launcher, args.launcher_args) == (1, "slurm", "-p x")
    assert args.bind_cores_to_rank and args.module and args.user_script == "pipeline.train"


def launched_slots(runner, monkeypatch, ranks: launch.Ranks, gpus: int) -> list[int]:
    """Run DeepSpeed's own runner on a machine of so many GPUs, up to the point where it would start the ranks."""
    for name, value in ranks.environment.items():
        monkeypatch.setenv(name, value)
    started = []

    def popen(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(wait=lambda: 0, returncode=0)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=popen))
    monkeypatch.setattr(runner.get_accelerator(), "device_count", lambda: gpus)
    runner.main(command_for(Path("x.json"), ranks, [], ["--quiet"]))
    [info] = [word.partition("=")[2] for word in started[0] if word.startswith("--world_info=")]
    assert "deepspeed.launcher.launch" in started[0]
    return json.loads(base64.urlsafe_b64decode(info))["localhost"]


@pytest.mark.parametrize(
    ("visible", "ranks", "slots"),
    [("4,5", None, [4, 5]), (" 6 ,2,7", "2", [2, 6]), ("3", "1", [3]), ("", "3", [0, 1, 2]), ("-1", None, [0, 1])],
)
def test_visible_devices_are_the_ones_used(runner, monkeypatch, write_config, visible, ranks, slots):
    experiment = config.load(write_config())
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    chosen = launch.ranks_of(arguments(*(["--ranks", ranks] if ranks else [])), experiment)
    assert chosen.world_size == len(slots)
    assert chosen.environment.get("DS_ACCELERATOR") == ("cpu" if visible in ("", "-1") else None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # here; the variable is read the same for a GPU
    assert launched_slots(runner, monkeypatch, chosen, gpus=8) == slots


def test_a_gpu_machine_trains_on_its_cpu_where_that_is_asked_for(monkeypatch, write_config):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    experiment = config.load(write_config())
    with pytest.raises(UserError, match=r"1 GPUs in CUDA_VISIBLE_DEVICES\n.*DS_ACCELERATOR=cpu"):
        launch.ranks_of(arguments("--ranks", "4"), experiment)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    chosen = launch.ranks_of(arguments("--ranks", "4"), experiment)
    assert chosen.world_size == 4 and chosen.environment["DS_ACCELERATOR"] == "cpu"
    assert "--num_accelerators" in chosen.options


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("ended", "exit_code", "how"),
    [
        (launcher.Ended(0), 1, "the launcher's exit code was 0"),
        (launcher.Ended(3), 3, "the launcher's exit code was 3"),
        (launcher.Ended(143), 143, "the launcher's exit code was 143"),
        (launcher.Ended(143, wanted=True), 143, "stopped by SIGTERM"),
        (launcher.Ended(130, wanted=True), 130, "stopped by SIGINT"),
    ],
)
def test_the_true_exit_code_is_said(capsys, monkeypatch, write_config, ended, exit_code, how):
    monkeypatch.setattr(launcher, "run_launcher", lambda *_, **__: ended)
    assert cli.main(["train", str(write_config()), "--ranks", "1"]) == exit_code
    message = capsys.readouterr().err
    assert f"did not finish ({how})" in message
    assert FILE_NAME not in message and "last checkpoint" not in message, "there are none"


def test_a_fault_is_written_into_the_record_once_the_ranks_have_ended(write_config):
    args = arguments()
    args.config = str(write_config())
    started = launch.Launch(args, [])
    fault = Fault("silent", 3, "worker-1", 512, "rank 3 on worker-1 is gone")
    record = started.folder / FILE_NAME
    started._note_fault(fault, "5e1f")
    assert not started.folder.exists(), "a run that never began has no record"
    started.folder.mkdir(parents=True)
    record.touch()
    started._note_fault(None, "5e1f")
    with exclusive(started.folder, "training"):
        started._note_fault(fault, "5e1f")  # rank 0 is still there, and writes
        assert record.read_text() == ""
    started._note_fault(fault, "5e1f")
    [event] = read_metrics(record)
    del event["time"]
    assert event == {
        "event": "fault",
        "kind": "silent",
        "message": "rank 3 on worker-1 is gone",
        "rank": 3,
        "host": "worker-1",
        "step": 512,
        "launch": "5e1f",
    }


def test_a_run_folder_that_this_host_does_not_share(capsys, monkeypatch, write_config, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    monkeypatch.setattr(launcher, "run_launcher", lambda *_, **__: launcher.Ended(0))
    options = ["--hostfile", str(tmp_path / "hosts"), "--launcher", "openmpi"]
    assert cli.main(["train", str(write_config()), *options]) == 1
    message = capsys.readouterr().err
    assert "exit code was 0" in message and "file system that this host shares with the first host" in message


def start(*command: str | Path, marker: str) -> subprocess.Popen:
    environment = {**os.environ, "ONEHOUR_TEST": marker, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def wait_for(condition, process: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def start_launch(script: str, *, marker: Path, pdsh: bool) -> subprocess.Popen:
    """`run_launcher` in a process of its own, with a shell script as the launcher; waits for the file `marker`."""
    script = f"{script}\ntouch {shlex.quote(str(marker))}; sleep 60 & wait; wait"
    code = f"""
import sys
from pathlib import Path
from pipeline import launcher
from pipeline.lease import Lease
launcher.STOP_SECONDS = 1
with Lease(Path({str(marker.parent / "run")!r})) as lease:
    ended = launcher.run_launcher(['bash', '-c', {script!r}], {{}}, lease, pdsh={pdsh})
sys.exit(ended.code if ended.wanted else 99)
"""
    process = start("-c", code, marker=str(marker))
    wait_for(marker.exists, process, 30)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("ranks", ["sleep 60 &", "(trap '' TERM INT HUP; sleep 60; sleep 60) &"], ids=["mild", "deaf"])
def test_a_signal_ends_the_launcher_and_everything_under_it(tmp_path, number, ranks):
    """As sent to `onehour train` alone; also where ranks ignore it and the launcher is gone first."""
    marker = tmp_path / "ready"
    process = start_launch(ranks, marker=marker, pdsh=False)
    try:
        assert len(processes_with(f"ONEHOUR_TEST={marker}")) >= 3
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 128 + number, process.communicate()[0]
        assert time.monotonic() - began < 4
        time.sleep(0.1)  # a killed process is there for a moment
        assert processes_with(f"ONEHOUR_TEST={marker}") == []
    finally:
        kill_everything(f"ONEHOUR_TEST={marker}")


def test_ranks_are_told_before_they_are_killed(tmp_path):
    """By us: DeepSpeed's runner hands no signal on to them."""
    marker, told = tmp_path / "ready", tmp_path / "told"
    rank = f"(trap 'touch {shlex.quote(str(told))}; exit' TERM; sleep 60 & wait) &"
    process = start_launch(rank, marker=marker, pdsh=False)
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert told.exists()
    finally:
        kill_everything(f"ONEHOUR_TEST={marker}")


def test_nohup_is_honoured(tmp_path):
    marker = tmp_path / "ready"
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start_launch("sleep 60 &", marker=marker, pdsh=False)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, previous)
        kill_everything(f"ONEHOUR_TEST={marker}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_pdsh_the_launcher_is_told_and_stops_the_other_hosts_itself(tmp_path, number):
    """Its handler runs to its end."""
    marker, handled = tmp_path / "ready", tmp_path / "handled"
    handler = f"trap 'sleep 1; touch {shlex.quote(str(handled))}; exit 1' TERM"
    process = start_launch(handler, marker=marker, pdsh=True)
    try:
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert handled.exists()
    finally:
        kill_everything(f"ONEHOUR_TEST={marker}")


@pytest.mark.parametrize(("pdsh", "order"), [(True, ("stop", "its launcher was told to stop")), (False, ("train", ""))])
def test_ranks_that_come_when_their_launcher_is_dead_do_not_train(tmp_path, pdsh, order):
    """On other hosts they may still be starting; here its process group has been ended."""
    with Lease(tmp_path / "run") as lease:
        ended = launcher.run_launcher(["bash", "-c", "kill -9 $$"], {}, lease, pdsh=pdsh)
    assert ended == launcher.Ended(128 + signal.SIGKILL)
    assert LeaseView(tmp_path / "run", lease.token).order() == order
    assert (tmp_path / "run").exists() == pdsh
    with Lease(tmp_path / "run") as following:
        assert LeaseView(tmp_path / "run", following.token).order() == ("train", "")


@pytest.mark.launcher
def test_a_sigterm_saves_after_the_same_update_on_all_ranks_and_no_rank_trains_on(write_config):
    """The real launcher, which in local mode has no handler of its own."""
    path = write_config("stopped", {"recipe.epochs": 3000, "recipe.checkpoint.every_epochs": 1000})
    run = path.parent / "runs" / "stopped"
    samples = [run / "samples" / f"from-0-rank-{rank}-of-2.jsonl" for rank in range(2)]
    process = start("-m", "pipeline.cli", "train", path, "--ranks", "2", marker=str(path))
    try:
        wait_for(lambda: all(file.exists() and file.read_text().count("\n") > 2 for file in samples), process, 150)
        assert len(processes_with(f"ONEHOUR_TEST={path}")) >= 5
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == STOPPED, output
        assert "stopping after this update" in output and "Traceback" not in output and "not finish" not in output
        time.sleep(0.1)
        assert processes_with(f"ONEHOUR_TEST={path}") == []
        done = {file.read_text().count("\n") for file in samples}
        [saved] = (run / "checkpoints").glob("step-*")
        assert done == {int(saved.name.removeprefix("step-"))}
        events = read_metrics(run / FILE_NAME)
        assert [event["step"] for event in events if event["event"] == "stopped"] == [*done]
        assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]
    finally:
        kill_everything(f"ONEHOUR_TEST={path}")
