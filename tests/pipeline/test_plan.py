"""`onehour plan`: the run as numbers, before anything starts and without what training needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from pipeline import config, plan
from pipeline.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG_8K = ROOT / "ds_configs" / "imagenet_8k.json"
CONFIG_256 = ROOT / "ds_configs" / "imagenet_256.json"
IMAGENET = ["--samples", "1281167"]
HEAVY = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "matplotlib")


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def summary(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def page(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("onehour: ")
    assert "Traceback" not in captured.err
    return captured.err


# ---------------------------------------------------------------- the numbers of the paper


def test_page_of_the_8k_run(capsys):
    text = page(capsys, str(CONFIG_8K), "--world-size", "256", *IMAGENET)
    for expected in (
        "resnet50 · 1,281,167 train · 90 epochs",
        "8,192 = 32 micro-batch × 1 accumulation × 256 ranks",
        "256 logical workers of n = 32",
        "156.39 per epoch · 14,076 in all",
        "0.1 per 256 → peak 3.2 (× 32)",
        "update 0 … 781 0.1 → 3.2 in equal increments per update · 5 epochs, gradual",
        "epoch 30 / 60 / 80 → 0.32 / 0.032 / 0.0032 · at updates 4,692 / 9,384 / 12,512",
        "feistel-v1, seed 0",
        "every weight and bias except normalisation's γ and β",
        "autocast float16",
        "keep 3 → runs/imagenet_8k",
    ):
        assert expected in text, text


def test_clipping_is_on_the_page_where_there_is_any(capsys):
    """DeepSpeed clips at 1 unless it is told otherwise, and the paper never does."""
    arguments = (str(CONFIG_8K), "--world-size", "256", *IMAGENET)
    assert "clipped" not in page(capsys, *arguments)
    text = page(capsys, *arguments, "--set", "gradient_clipping=0.5")
    assert "gradients of norm above 0.5 are clipped to it · not in the paper's recipe" in text


def test_summary_of_the_8k_run(capsys):
    numbers = summary(capsys, str(CONFIG_8K), "--world-size", "256", *IMAGENET)
    assert (numbers["train_batch_size"], numbers["micro_batch"], numbers["logical_workers"]) == (8192, 32, 256)
    assert (numbers["reference_lr"], numbers["peak_lr"], numbers["reference_batch"]) == (0.1, 3.2, 256)
    assert numbers["steps"] == 14_076
    assert numbers["steps_per_epoch"] == 1_281_167 / 8192
    assert f"{numbers['steps_per_epoch']:.2f}" == "156.39"
    assert numbers["milestones"] == [
        {"epoch": 30.0, "update": 4692, "lr": 0.32},
        {"epoch": 60.0, "update": 9384, "lr": 0.032},
        {"epoch": 80.0, "update": 12_512, "lr": 0.0032},
    ]
    rates = {entry["update"]: entry["lr"] for entry in numbers["lr_updates"]}
    assert list(rates) == [0, 1, 781, 782, 4692, 9384, 12_512, 14_075]
    assert (rates[0], rates[782], rates[14_075]) == (0.1, 3.2, 0.0032)
    assert rates[1] == float(Fraction(1, 10) + Fraction(31, 10) * 8192 / (5 * 1_281_167))
    assert rates[781] == float(Fraction(1, 10) + Fraction(31, 10) * 781 * 8192 / (5 * 1_281_167))


def test_summary_of_the_256_run(capsys):
    numbers = summary(capsys, str(CONFIG_256), "--world-size", "8", *IMAGENET)
    assert (numbers["train_batch_size"], numbers["logical_workers"], numbers["accumulation"]) == (256, 8, 1)
    assert (numbers["peak_lr"], numbers["steps"]) == (0.1, 450_411)
    assert [m["update"] for m in numbers["milestones"]] == [150_137, 300_274, 400_365]
    assert "nothing to warm up" in page(capsys, str(CONFIG_256), "--world-size", "8", *IMAGENET)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 256), (8, 32), (64, 4), (256, 1)])
def test_world_size_changes_the_accumulation_and_nothing_else(capsys, world_size, accumulation):
    numbers = summary(capsys, str(CONFIG_8K), "--world-size", str(world_size), *IMAGENET)
    reference = summary(capsys, str(CONFIG_8K), "--world-size", "256", *IMAGENET)
    assert numbers["accumulation"] == accumulation
    assert numbers["deepspeed"]["gradient_accumulation_steps"] == accumulation
    differing = {key for key in reference if numbers[key] != reference[key]}
    assert differing == ({"world_size", "accumulation", "deepspeed"} if world_size != 256 else set())
    changed = {key for key in numbers["deepspeed"] if numbers["deepspeed"][key] != reference["deepspeed"][key]}
    assert changed <= {"gradient_accumulation_steps"}


def test_json_holds_the_resolved_deepspeed_configuration(capsys, tmp_path):
    numbers = summary(capsys, str(CONFIG_8K), "--world-size", "8", *IMAGENET, "--set", "recipe.seed=5")
    resolved = numbers["deepspeed"]
    assert resolved["train_batch_size"] == 8192
    assert resolved["train_micro_batch_size_per_gpu"] == 32
    assert resolved["gradient_accumulation_steps"] == 32
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["recipe"]["seed"] == numbers["seed"] == 5
    assert resolved["recipe"]["transform"]["scale"] == [0.08, 1.0]
    assert numbers["overrides"] == ["recipe.seed=5"]
    path = tmp_path / "resolved.json"
    path.write_text(json.dumps(resolved))
    again = summary(capsys, str(path), "--world-size", "8", *IMAGENET)
    assert again["deepspeed"] == resolved
    assert again["lr_updates"] == numbers["lr_updates"]


@pytest.mark.parametrize(
    ("settings", "said", "recorded"),
    [
        ([], "fp16 block → autocast float16 + dynamic loss scale", "float16"),
        (["fp16.loss_scale=128"], "fp16 block → autocast float16 + loss scale 128", "float16"),
        (["fp16.enabled=false"], "precision  fp32 throughout, without TF32", "fp32"),
        (
            ["fp16.enabled=false", "recipe.step.tf32=true"],
            "in TF32, ten bits of mantissa, on GPUs that have it",
            "tf32",
        ),
        (["fp16.enabled=false", "bf16.enabled=true"], "bf16 block → autocast bfloat16", "bfloat16"),
    ],
)
def test_the_page_says_which_precision_is_in_force(capsys, settings, said, recorded):
    arguments = [str(CONFIG_8K), "--world-size", "8", *IMAGENET]
    arguments += [argument for setting in settings for argument in ("--set", setting)]
    assert said in page(capsys, *arguments)
    assert summary(capsys, *arguments)["precision"] == recorded


def test_epochs_that_do_not_fill_the_last_update():
    loaded = config.load(CONFIG_8K)
    resolved = plan.resolve(loaded, 1, samples=1_281_167)
    assert resolved.steps_per_epoch == Fraction(1_281_167, 8192)
    assert resolved.total_samples == 90 * 1_281_167
    assert (resolved.steps - 1) * 8192 < resolved.total_samples <= resolved.steps * 8192
    assert resolved.epoch(1_281_167) == 1.0


@pytest.mark.parametrize(
    ("samples", "epochs", "steps"), [(8192, "2", 2), (8192, "2.5", 3), (8193, "1", 2), (1, "1", 1)]
)
def test_steps_round_up_and_never_past_a_full_batch(capsys, samples, epochs, steps):
    arguments = ["--world-size", "1", "--samples", str(samples), "--set", f"recipe.epochs={epochs}"]
    numbers = summary(capsys, str(CONFIG_8K), *arguments)
    assert numbers["steps"] == steps
    assert all(0 <= entry["update"] < steps for entry in numbers["lr_updates"])


def test_milestones_after_the_end_are_said_to_be_never_reached(capsys):
    arguments = [str(CONFIG_8K), "--world-size", "256", *IMAGENET]
    text = page(capsys, *arguments, "--set", "recipe.epochs=60")
    assert "epoch 30 → 0.32 · at updates 4,692\n" in text
    assert "epoch 60 / 80 never reached: the run ends at epoch 60" in text
    assert "updates 4,692 /" not in text and "12,512" not in text
    numbers = summary(capsys, *arguments, "--set", "recipe.epochs=60")
    assert [milestone["update"] for milestone in numbers["milestones"]] == [4692, None, None]
    text = page(capsys, *arguments, "--set", "recipe.epochs=20")
    assert "epoch 30 / 60 / 80 never reached: the run ends at epoch 20" in text and "at updates" not in text


@pytest.mark.parametrize("warmup", ["gradual", "constant"])
@pytest.mark.parametrize("epochs", ["2", "5"])
def test_warmup_that_outlasts_the_run_never_reaches_the_peak(capsys, warmup, epochs):
    settings = ["--set", f"recipe.epochs={epochs}", "--set", f"scheduler.params.warmup={warmup}"]
    arguments = [str(CONFIG_8K), "--world-size", "256", *IMAGENET, *settings]
    numbers = summary(capsys, *arguments)
    last = numbers["lr_updates"][-1]
    assert last["update"] == numbers["steps"] - 1 and last["lr"] < 3.2
    text = page(capsys, *arguments)
    assert f"update 0 … {last['update']:,} 0.1 → {last['lr']:.6g} · 5 epochs, {warmup}" in text
    assert f"3.2 is never reached: the run ends at epoch {epochs}" in text


@pytest.mark.parametrize(
    ("samples", "epochs", "said"),
    [
        (8192, "2.5", "3 in all · the last reaches past epoch 2.5 by 0.5 of a batch"),
        (12_288, "3", "5 in all · the last reaches past epoch 3 by 0.5 of a batch"),
        (8192, "2", "2 in all\n"),
    ],
)
def test_how_far_the_last_update_reaches_is_right_for_any_number_of_epochs(capsys, samples, epochs, said):
    arguments = ["--world-size", "1", "--samples", str(samples), "--set", f"recipe.epochs={epochs}"]
    assert said in page(capsys, str(CONFIG_8K), *arguments)


def test_data_and_run_options_are_overrides(capsys):
    numbers = summary(capsys, str(CONFIG_8K), "--world-size", "1", *IMAGENET, "--data", "elsewhere", "--run", "1")
    assert numbers["deepspeed"]["recipe"]["data"] == "elsewhere"
    assert numbers["run"] == "1"


def test_hostfile_counts_the_ranks(capsys, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=8\nb slots=8\n")
    text = page(capsys, str(CONFIG_8K), "--hostfile", str(hostfile), *IMAGENET)
    assert "8,192 = 32 micro-batch × 16 accumulation × 16 ranks (2 hosts × 8)" in text
    text = page(capsys, str(CONFIG_8K), "--hostfile", str(hostfile), "--include", "b:0,1", *IMAGENET)
    assert "× 128 accumulation × 2 ranks" in text


# ---------------------------------------------------------------- a real process


def test_command_is_quick_and_complete():
    # in processor time, which other work on the machine does not change: the command waits for nothing
    before = os.times()
    done = python("-m", "pipeline.cli", "plan", str(CONFIG_8K), "--world-size", "256", *IMAGENET)
    after = os.times()
    assert (done.returncode, done.stderr) == (0, "")
    assert "156.39 per epoch · 14,076 in all" in done.stdout
    assert after.children_user - before.children_user + after.children_system - before.children_system < 2


def test_command_imports_nothing_that_trains():
    code = (
        "import sys; from pipeline.cli import main; code = main(sys.argv[1:]); "
        f"print('imported:', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = python("-c", code, "plan", str(CONFIG_8K), "--world-size", "256", *IMAGENET)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_mistake_ends_the_process_with_code_2_and_no_traceback():
    done = python("-m", "pipeline.cli", "plan", str(CONFIG_8K), "--world-size", "48", *IMAGENET)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("onehour: ")
    assert "256 / 48 = 5.33" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--world-size", "48", *IMAGENET], ["cannot be split over 48 ranks", "Use 32 or 64 ranks"]),
        (["--world-size", "0", *IMAGENET], ["world size 0"]),
        (["--world-size", "-1", *IMAGENET], ["world size -1"]),
        (["--world-size", "8", "--samples", "0"], ["--samples 0", "at least one image"]),
        (["--world-size", "8", "--ranks", "8", *IMAGENET], ["--world-size and --hostfile or --ranks"]),
        (["--world-size", "8", "--hostfile", "h", *IMAGENET], ["--world-size and --hostfile or --ranks"]),
        (["--hostfile", "no-such-hostfile", *IMAGENET], ["no-such-hostfile: there is no such hostfile"]),
        (["--include", "a", *IMAGENET], ["--include and --exclude filter a hostfile"]),
        (["--ranks", "0", *IMAGENET], ["--ranks 0: at least one rank"]),
        (["--world-size", "8", "--data", "no-such-folder"], ["no-such-folder"]),
        (["--world-size", "8", *IMAGENET, "--set", "recipe.epoch=1"], ['did you mean "epochs"?']),
        (["--world-size", "8", *IMAGENET, "--set", "epochs"], ["--set epochs: not of the form"]),
        (["--world-size", "8", *IMAGENET, "--set", "optimizer.params.lr=NaN"], ["optimizer.params.lr"]),
        (["--world-size", "8", *IMAGENET, "--set", "recipe.epochs=Infinity"], ["recipe.epochs"]),
        (
            ["--world-size", "8", *IMAGENET, "--set", 'optimizer.params.weight_decay="1e-4"'],
            ["optimizer.params.weight_decay"],
        ),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_mistake_is_one_message_and_code_2(capsys, arguments, expected):
    message = refused(capsys, str(CONFIG_8K), *arguments)
    for part in expected:
        assert part in message


def test_missing_configuration_names_the_near_one(capsys):
    message = refused(capsys, str(CONFIG_8K.with_name("imagenet_8.json")), "--world-size", "1", *IMAGENET)
    assert f"Did you mean {CONFIG_8K}?" in message


@pytest.mark.parametrize("arguments", [["plan"], [], ["plann"], ["plan", "x.json", "--worldsize", "3"]])
def test_misspelt_command_line_is_argparses_error(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: onehour" in capsys.readouterr().err


# ---------------------------------------------------------------- what will decode


def data_row(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    return next(line for line in page(capsys, *arguments).splitlines() if line.startswith("data"))


def test_the_page_names_the_live_decoder_and_the_crop_index(capsys, monkeypatch, write_config, tiny_shards, tmp_path):
    from shards import jpeg

    path = str(write_config())
    copied = tmp_path / "copied"
    shutil.copytree(tiny_shards, copied)
    copied.chmod(0o755)
    kept = [index.replace(tmp_path / index.name) for index in sorted(copied.glob("train-*.cropindex"))]
    arguments = (path, "--ranks", "2", "--data", str(copied))
    monkeypatch.setattr(jpeg, "unavailable", lambda: None)
    monkeypatch.setattr(jpeg, "describe", lambda: "C extension, AVX2")
    mend = f"no crop index: shards index {copied} --decode"
    assert f"· decode: C extension, AVX2 · {mend} · val on 35 exactly" in data_row(capsys, *arguments)
    if kept:
        for index in kept[:3]:
            shutil.copy(index, copied)
        assert "· decode: C extension, AVX2 · crop index for 3 shards · " in data_row(capsys, *arguments)
        shutil.copy(kept[3], copied)
        assert "· decode: C extension, AVX2 · crop index · " in data_row(capsys, *arguments)
        shutil.copy(kept[3], copied / kept[2].name)  # of another shard
        text = refused(capsys, *arguments)
        assert kept[2].name in text and "shards index" in text
    monkeypatch.setattr(jpeg, "unavailable", lambda: "was not built")
    assert "· decode: simplejpeg (why no faster one: onehour doctor) · " in data_row(capsys, *arguments)
    assert "· decode: Pillow · " in data_row(capsys, *arguments, "--set", "recipe.loader.decoder=pillow")
    text = refused(capsys, *arguments, "--set", "recipe.loader.decoder=native")
    assert "recipe.loader.decoder" in text and "compiler" in text
    assert summary(capsys, *arguments)["decoder"] == "simplejpeg"
