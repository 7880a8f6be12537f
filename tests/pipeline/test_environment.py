"""What travels to ranks on other hosts, and that it arrives as it is: through DeepSpeed, pdsh and a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import environment
from shards.errors import UserError

BINARIES = str(Path(sys.executable).parent)
# each of them means something to a shell, to pdsh, or to a reader of NAME=VALUE
NASTY = {
    "NCCL_PLAIN": "IB,RoCE:@+./-_",
    "NCCL_DOLLAR": "$HOME ${PATH} $(id) $$",
    "NCCL_BACKTICK": "`id`",
    "NCCL_QUOTES": "it's \"quoted\" '",
    "NCCL_BACKSLASH": 'a\\b \\\\ \\$ \\" end\\',
    "NCCL_PERCENT": "%h %u %n %% %%h 50% %",
    "NCCL_PERCENT_PLAIN": "a%hb%%n",
    "NCCL_EQUALS": "a=b=c",
    "NCCL_GLOB": "* ? [a] {b,c} ~ ~root # ! ; & | < > ( )",
    "NCCL_UNICODE": "é × –",
    "NCCL_EMPTY": "",
    "NCCL_TAB": "a\tb",
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home and a working folder without a `.deepspeed_env`."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


# ---------------------------------------------------------------- which


def test_what_ranks_need_travels_and_secrets_do_not():
    needed = {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "mlx5_0,mlx5_1",
        "LD_LIBRARY_PATH": "/opt/nccl/lib",
        "HF_HOME": "/data/hf",
        "DS_ACCELERATOR": "cpu",
        "https_proxy": "http://proxy:3128",
        "OMP_NUM_THREADS": "4",
    }
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_ACCESS_KEY_ID": "s",
        "HF_TOKEN": "s",
        "WANDB_API_KEY": "s",
        "ONEHOUR_PASSWORD": "s",
        "HTTPS_PROXY": "http://me:s@proxy:3128",
    }
    of_this_host = {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "SHELL": "/bin/sh", "RANK": "0", "DS_ENV_FILE": "x"}
    found = environment.for_hosts({**needed, **secrets, **of_this_host, "PATH": "/usr/bin"})
    assert found == {**needed, "PATH": f"{BINARIES}{os.pathsep}/usr/bin"}


def test_ranks_have_one_thread_where_nobody_says_otherwise_and_the_interpreters_own_programs():
    assert environment.for_hosts({}) == {"OMP_NUM_THREADS": "1", "PATH": BINARIES}


def test_the_users_files_win_the_nearer_one_most(home):
    (home / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=home\nAWS_SECRET_ACCESS_KEY=mine\nPATH=/home/bin\n")
    Path(".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=work\n")
    found = environment.for_hosts({"GLOO_SOCKET_IFNAME": "environment", "PATH": "/usr/bin"})
    assert found == {
        "GLOO_SOCKET_IFNAME": "work",
        "AWS_SECRET_ACCESS_KEY": "mine",
        "PATH": "/home/bin",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_of_another_name(home, absolute):
    path = (home / "other") if absolute else Path("other")
    path.write_text("A=1")
    (home / ".deepspeed_env").write_text("A=2")
    assert environment.for_hosts({"DS_ENV_FILE": str(path)})["A"] == "1"


def test_blank_lines_and_comments_are_fine():
    Path(".deepspeed_env").write_text("\n# of our cluster\n  \nA = 1 \n\tB=x # y\n  # C=2\nD=\nE=a=b\n\n")
    found = environment.for_hosts({})
    assert {name: found[name] for name in found if len(name) == 1} == {"A": "1", "B": "x # y", "D": "", "E": "a=b"}


@pytest.mark.parametrize("line", ["export A=1", "A", "=1", "1A=2", "A B=2", "A-B=1"])
def test_a_line_that_is_none_is_named(line):
    Path(".deepspeed_env").write_text(f"OK=1\n\n{line}\n")
    with pytest.raises(UserError, match=r"^\.deepspeed_env:3: '.*' is not of the form NAME=VALUE\n"):
        environment.for_hosts({})


def test_a_file_that_is_no_text_is_named():
    Path(".deepspeed_env").write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match=r"^\.deepspeed_env: cannot be read"):
        environment.for_hosts({})


# ---------------------------------------------------------------- how


@pytest.fixture
def runner(monkeypatch):
    """DeepSpeed's launcher, up to the command that it would start, which is in `commands`."""
    from deepspeed.launcher import runner

    def popen(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        runner.commands.append((command, env))
        return SimpleNamespace(wait=lambda: 0, returncode=0)

    monkeypatch.setattr(runner, "commands", [], raising=False)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=popen))
    return runner


def command_of(runner, launcher: str, variables: dict[str, str], monkeypatch) -> tuple[list[str], dict[str, str]]:
    """The command line that DeepSpeed's launcher makes of the variables, and its environment."""
    Path("hosts").write_text("a slots=2\nb slots=2\n")
    with environment.travelling(variables, launcher) as setting:
        # a module reads the variable while it is imported
        monkeypatch.setattr(runner, "DEEPSPEED_ENVIRONMENT_NAME", setting["DS_ENV_FILE"])
        options = ["--hostfile", "hosts", "--no_ssh_check", "--master_addr", "10.0.0.1", "--launcher", launcher]
        runner.main([*options, "--quiet", "--module", "pipeline.train", "x.json"])
    assert not Path(setting["DS_ENV_FILE"]).exists()
    return runner.commands.pop()


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh")
def test_values_arrive_through_deepspeed_pdsh_and_the_shell_of_every_host(runner, tmp_path, monkeypatch):
    """All of it real, but for ssh, which does what ssh does: it has a shell read its arguments, joined by blanks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in {
        "ssh": 'while [ "${1#-}" != "$1" ]; do shift; done; export HOST="$1"; shift; exec sh -c "$*"',
        "python": f'env -0 > {tmp_path}/arrived-$HOST; printf "%s\\0" "$@" > {tmp_path}/said-$HOST',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setattr("deepspeed.launcher.multinode_runner.sys.executable", str(tools / "python"))
    command, env = command_of(runner, "pdsh", {**NASTY, "PATH": os.environ["PATH"]}, monkeypatch)
    assert command[0] == "pdsh"
    env = {name: value for name, value in env.items() if name not in NASTY} | {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and done.stderr == "", done
    for number, host in enumerate("ab"):
        arrived = (tmp_path / f"arrived-{host}").read_text().split("\0")
        values = dict(entry.split("=", 1) for entry in arrived if entry)
        assert {name: values.get(name) for name in NASTY} == NASTY
        said = (tmp_path / f"said-{host}").read_text().split("\0")
        assert f"--node_rank={number}" in said and "pipeline.train" in said


def test_pdshs_ssh_asks_nothing_and_keeps_the_users_options(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-J jump")
    with environment.travelling({"A": "1"}, "pdsh") as setting:
        assert setting["PDSH_SSH_ARGS_APPEND"] == f"-J jump {environment.SSH_OPTIONS}"
        assert Path(setting["DS_ENV_FILE"]).read_text() == "A=1\n"
        assert Path(setting["DS_ENV_FILE"]).stat().st_mode & 0o077 == 0, "the user's own may have secrets"
    with environment.travelling({}, "pdsh") as setting:
        assert setting == {}


@pytest.mark.parametrize("launcher", ["openmpi", "slurm"])
def test_launchers_without_a_shell_are_given_plain_values(runner, launcher, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")  # it is looked for, and not started
    command, _ = command_of(runner, launcher, {"NCCL_A": "x@%+=:./-_", "PATH": "/bin"}, monkeypatch)
    text = " ".join(command)
    assert ("-x NCCL_A=x@%+=:./-_" if launcher == "openmpi" else ",NCCL_A=x@%+=:./-_,PATH=/bin") in text


PLAIN = {"NCCL_PLAIN", "NCCL_PERCENT_PLAIN", "NCCL_EQUALS", "NCCL_EMPTY"}


@pytest.mark.parametrize("name", sorted(NASTY.keys() - PLAIN))
def test_launchers_without_a_shell_refuse_what_would_arrive_in_quotes(name):
    with pytest.raises(UserError, match=f"{name}=.* cannot be passed on by --launcher openmpi"):
        environment.file_text({name: NASTY[name]}, "openmpi")


def test_slurm_takes_a_comma_for_the_end_of_a_value():
    assert environment.file_text({"NCCL_IB_HCA": "mlx5_0,mlx5_1"}, "openmpi") == "NCCL_IB_HCA=mlx5_0,mlx5_1\n"
    with pytest.raises(UserError, match="NCCL_IB_HCA='mlx5_0,mlx5_1' cannot be passed on by --launcher slurm"):
        environment.file_text({"NCCL_IB_HCA": "mlx5_0,mlx5_1"}, "slurm")


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "slurm"])
def test_a_value_of_the_environment_that_cannot_travel_stays_and_one_of_the_users_file_is_an_error(
    launcher, monkeypatch
):
    """Nobody wrote the first one down to have it travel."""
    monkeypatch.setenv("NCCL_X", "two\nlines")
    assert environment.file_text({"NCCL_X": "two\nlines", "PATH": "/a b\n", "A": "1"}, launcher) == "A=1\n"
    with pytest.raises(UserError, match="NCCL_X"):
        environment.file_text({"NCCL_X": "other\nlines"}, launcher)
