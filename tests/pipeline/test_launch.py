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

from pipeline import cli, config, launch
from pipeline.experiment import overrides_of
from pipeline.metrics import FILE_NAME
from shards.errors import UserError
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
    command = launch._command(experiment, ranks, options or [])
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
    ("code", "exit_code", "how"),
    [
        (0, 1, "the launcher's exit code was 0"),
        (3, 3, "the launcher's exit code was 3"),
        (-15, 143, "stopped by SIGTERM"),
        (-2, 130, "stopped by SIGINT"),
    ],
)
def test_the_true_exit_code_is_said(capsys, monkeypatch, write_config, code, exit_code, how):
    monkeypatch.setattr(launch, "_launch", lambda *_, **__: code)
    assert cli.main(["train", str(write_config()), "--ranks", "1"]) == exit_code
    message = capsys.readouterr().err
    assert f"did not finish ({how})" in message
    assert FILE_NAME not in message and "last checkpoint" not in message, "there are none"


def test_a_run_folder_that_this_host_does_not_share(capsys, monkeypatch, write_config, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    monkeypatch.setattr(launch, "_launch", lambda *_, **__: 0)
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


def start_launch(script: str, *, marker: Path, stops_its_ranks: bool) -> subprocess.Popen:
    """`launch._launch` in a process of its own, with a shell script as the launcher; waits for the file `marker`."""
    script = f"{script}\ntouch {shlex.quote(str(marker))}; sleep 60 & wait; wait"
    code = (
        "import sys; from pipeline import launch; launch.STOP_SECONDS = 1; "
        f"code = launch._launch(['bash', '-c', {script!r}], {{}}, stops_its_ranks={stops_its_ranks}); "
        "sys.exit(100 - code)"
    )
    process = start("-c", code, marker=str(marker))
    wait_for(marker.exists, process, 30)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("ranks", ["sleep 60 &", "(trap '' TERM INT HUP; sleep 60; sleep 60) &"], ids=["mild", "deaf"])
def test_a_signal_ends_the_launcher_and_everything_under_it(tmp_path, number, ranks):
    """As sent to `onehour train` alone; also where ranks ignore it and the launcher is gone first."""
    marker = tmp_path / "ready"
    process = start_launch(ranks, marker=marker, stops_its_ranks=False)
    try:
        assert len(processes_with(f"ONEHOUR_TEST={marker}")) >= 3
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 100 + number, process.communicate()[0]
        assert time.monotonic() - began < 4
        time.sleep(0.1)  # a killed process is there for a moment
        assert processes_with(f"ONEHOUR_TEST={marker}") == []
    finally:
        kill_everything(f"ONEHOUR_TEST={marker}")


def test_ranks_are_told_before_they_are_killed(tmp_path):
    """By us: DeepSpeed's runner hands no signal on to them."""
    marker, told = tmp_path / "ready", tmp_path / "told"
    rank = f"(trap 'touch {shlex.quote(str(told))}; exit' TERM; sleep 60 & wait) &"
    process = start_launch(rank, marker=marker, stops_its_ranks=False)
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
        process = start_launch("sleep 60 &", marker=marker, stops_its_ranks=False)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, previous)
        kill_everything(f"ONEHOUR_TEST={marker}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_pdsh_the_launcher_is_told_and_stops_the_other_hosts_itself(tmp_path, number):
    """Its handler runs to its end; it shares the terminal's process group, where ssh may ask something."""
    marker, handled = tmp_path / "ready", tmp_path / "handled"
    handler = f"trap 'sleep 1; touch {shlex.quote(str(handled))}; exit 1' TERM\n"
    handler += "read -r _ _ _ _ group _ < /proc/$$/stat; echo group $group"
    process = start_launch(handler, marker=marker, stops_its_ranks=True)
    try:
        process.send_signal(number)
        assert process.wait(10) == 100 + number
        assert handled.exists()
    finally:
        kill_everything(f"ONEHOUR_TEST={marker}")
    assert f"group {process.pid}" in process.communicate()[0]


@pytest.mark.launcher
def test_no_rank_trains_on_after_a_sigterm(write_config):
    """The real launcher, which in local mode has no handler of its own."""
    path = write_config("stopped", {"recipe.epochs": 3000})
    samples = path.parent / "runs" / "stopped" / "samples" / "from-0-rank-1-of-2.jsonl"
    process = start("-m", "pipeline.cli", "train", path, "--ranks", "2", marker=str(path))
    try:
        wait_for(lambda: samples.exists() and samples.read_text().count("\n") > 2, process, 150)
        assert len(processes_with(f"ONEHOUR_TEST={path}")) >= 5
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=15)
        assert process.returncode == 128 + signal.SIGTERM, output
        assert "did not finish (stopped by SIGTERM)" in output and "Traceback" not in output
        time.sleep(0.1)
        assert processes_with(f"ONEHOUR_TEST={path}") == []
        assert time.monotonic() - began < launch.STOP_SECONDS + 2
    finally:
        kill_everything(f"ONEHOUR_TEST={path}")
