"""docs/clusters.md: its commands are ones that the tools take, and its files are what they should be."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from pipeline import config, plan, train
from pipeline.hosts import read_hostfile, read_launcher_options, select
from pipeline.rendezvous import discover

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ")
    for language, block in BLOCKS
    if language == "console"
    for line in block.splitlines()
    if line.startswith("$ ")
]
IMAGENET, RANKS = 1_281_167, 32


def block(language: str) -> str:
    (found,) = [text for name, text in BLOCKS if name == language]
    return found


def words_after(command: str, start: str) -> list[str]:
    """A command's words behind the first that ends with `start`, without the comment."""
    words = shlex.split(command.replace(" K ", " 3 "), comments=True)
    position = next(number for number, word in enumerate(words) if word.endswith(start))
    return words[position + 1 :]


def check_training(arguments: list[str], ranks: int = RANKS) -> None:
    """The arguments are pipeline.train's, and its configuration allows the ranks."""
    args = train._parse(arguments)
    plan.resolve(config.load(ROOT / args.config, args.set), ranks, samples=IMAGENET)


@pytest.mark.parametrize("script", [block("bash"), *COMMANDS])
def test_a_shell_understands_it(script):
    done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_has_a_command_for_every_launcher():
    starts = {shlex.split(command)[0] for command in COMMANDS}
    assert {"./run.sh", "deepspeed", "torchrun", "mpirun", "mpiexec", "kubectl", "aws", "gcloud"} <= starts


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("torchrun")])
def test_torchrun_takes_its_commands(command):
    args = get_args_parser().parse_args(words_after(command, "torchrun"))
    assert (args.nnodes, args.nproc_per_node, args.training_script, args.module) == ("4", "8", "pipeline.train", True)
    assert (args.node_rank, args.master_addr) == (3, "node-0") or args.rdzv_endpoint == "node-0:29400"
    check_training(args.training_script_args)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("deepspeed")])
def test_the_launcher_takes_its_commands(command):
    words = words_after(command, "deepspeed")
    assert words[:2] == ["--hostfile", "hosts"]
    module = words.index("--module")
    read_launcher_options(words[2:module])
    assert words[module + 1] == "pipeline.train"
    check_training(words[module + 2 :])


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("mpi")])
def test_ranks_of_mpirun_get_the_training(command):
    words = words_after(command, "python")
    assert words[:2] == ["-m", "pipeline.train"]
    assert ("-x MASTER_ADDR=node-0" in command) != ("-genv MASTER_ADDR node-0" in command)
    check_training(words[2:])


def test_the_hostfile_is_one_and_filters_fit_it(tmp_path):
    lines = [line for language, text in BLOCKS for line in text.splitlines() if re.match(r"node-\d slots", line)]
    path = tmp_path / "hosts"
    path.write_text("\n".join(lines))
    slots = read_hostfile(path)
    assert sum(slots.values()) == RANKS
    for command in COMMANDS:
        for option in re.findall(r"--(include|exclude) (\S+)", command):
            ranks = sum(map(len, select(slots, **dict([option])).values()))
            check_training(["ds_configs/imagenet_8k.json"], ranks)


def test_the_batch_script_starts_a_task_per_rank():
    script = block("bash")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    assert script.startswith("#!/bin/bash\n")
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == RANKS
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"].startswith("TERM@"), "to the ranks; B: would be to the script alone"
    (line,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert "--kill-on-bad-exit=0 " in line, "rank 0 saves while others may have left with 75 already"
    check_training(words_after(line, "pipeline.train"))


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_the_batch_script_requeues_what_was_saved(tmp_path, code, requeued):
    """With an srun that ends like the ranks would, and a scontrol that notes what it is told."""
    (tmp_path / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/told\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    done = subprocess.run(["bash", "-c", block("bash")], env=environ, check=False)
    assert done.returncode == code
    told = tmp_path / "told"
    assert (told.read_text() if told.exists() else "") == ("requeue 7\n" if requeued else "")


def test_kubernetes_objects_fit_together():
    service, job = yaml.safe_load_all(block("yaml"))
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["clusterIP"] == "None", "headless; YAML's None is a string"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never", "as a podFailurePolicy demands"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert [rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"][:1]] == [
        container["name"]
    ]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in variables.values()), "Kubernetes refuses others"
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]

    assert container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
    script = script.replace("\\\n", " ").replace('"$CONFIG"', variables["CONFIG"]).replace("$JOB_COMPLETION_INDEX", "3")
    checked, started = script.strip().splitlines()
    args = get_args_parser().parse_args(words_after(started, "torchrun"))
    assert int(args.nnodes) == spec["completions"] and args.node_rank == 3
    assert args.master_addr == f"{name}-0.{pod['subdomain']}"
    ranks = int(args.nnodes) * int(args.nproc_per_node)
    assert f"--world-size {ranks} " in checked
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(args.nproc_per_node)
    check_training(args.training_script_args, ranks)


@pytest.mark.parametrize("code", [0, 2])
def test_the_pod_ends_with_the_plans_exit_code(tmp_path, code):
    """A mistake must reach the Job as exit code 2, and a plan without one must let the training begin."""
    (script,) = list(yaml.safe_load_all(block("yaml")))[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, text in (("onehour", f"exit {code}"), ("torchrun", 'echo "$@"; exit 1')):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    environ = {"PATH": "/usr/bin:/bin", "CONFIG": "c.json", "JOB_COMPLETION_INDEX": "2"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == (code or 1)
    assert ("--node-rank 2 " in done.stdout) == (code == 0)


def test_mpirun_takes_its_options(tmp_path):
    """Open MPI with the page's own options, on this host."""
    mpirun = shutil.which("mpirun.openmpi")
    if mpirun is None:
        pytest.skip("Open MPI is not installed")
    (command,) = [command for command in COMMANDS if command.startswith("mpirun")]
    words = shlex.split(command)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=4\n")
    options = [
        str(hosts) if word == "hosts" else "4" if word == "32" else word for word in words[1 : words.index("-x") + 2]
    ]
    dump = ["bash", "-c", f"env > {tmp_path}/$OMPI_COMM_WORLD_RANK.env"]
    done = subprocess.run([mpirun, "--allow-run-as-root", *options, *dump], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(4):
        lines = (tmp_path / f"{rank}.env").read_text().splitlines()
        found = discover(dict(line.split("=", 1) for line in lines if re.match(r"(OMPI|PMIX|MASTER)\w*=", line)))
        assert (found.rank, found.size, found.local_rank, found.master_addr) == (rank, 4, rank, "node-0")


def test_instances_become_a_hostfile(tmp_path):
    (command,) = [command for command in COMMANDS if "describe-instances" in command]
    assert "slots=8" in command
    pipeline = command.partition(" | ")[2].replace("> hosts", f"> {tmp_path}/hosts")
    subprocess.run(["bash", "-c", pipeline], input="10.0.0.4\t10.0.0.5\n", text=True, check=True)
    assert json.dumps(read_hostfile(tmp_path / "hosts")) == '{"10.0.0.4": 8, "10.0.0.5": 8}'
