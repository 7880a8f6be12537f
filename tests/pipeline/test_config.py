"""Every mistake in a configuration is one `UserError` with the file, the JSON path and the mend; the rest loads."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline import batch, config, deepspeed_keys, deepspeed_schema, schema
from shards.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
SHIPPED = sorted(CONFIGS.rglob("*.json"))
GOOD = json.loads((CONFIGS / "imagenet_8k.json").read_text(encoding="utf-8"))
ABSENT = type("Absent", (), {"__repr__": lambda self: "absent"})()  # a name of its own in the test ids


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The 8k configuration with values set, or removed, by dotted path."""
    values = copy.deepcopy(GOOD)
    for path, value in changes.items():
        section = values
        *parents, last = path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is ABSENT:
            del section[last]
        else:
            section[last] = value
    return values


def write(folder: Path, values: Any) -> Path:
    path = folder / "experiment.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message of the one error that loading gives; it starts with the file unless an override is malformed."""
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    assert "Traceback" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


def assert_refused(folder: Path, changes: dict[str, Any], *expected: str) -> None:
    path = write(folder, changed(changes))
    message = refusal(path)
    assert message.startswith(f"{path}: "), message
    for part in expected:
        assert part in message, message


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_load_and_close_the_traps(path):
    loaded = config.load(path)
    assert loaded.raw["scheduler"]["type"] == "GradualWarmupLR"
    assert "zero_optimization" not in loaded.raw
    assert loaded.raw.get("gradient_allreduce_op", "mean") == "mean"
    assert loaded.raw["timers"]["throughput"]["enabled"] is False
    if path.parent.name == "modern":  # where others than the paper say what is trained: test_modern.py
        return
    assert loaded.raw["gradient_clipping"] == 0.0
    assert loaded.raw["optimizer"]["params"]["nesterov"] is True
    assert loaded.raw["optimizer"]["params"]["momentum"] == 0.9
    if path.stem.startswith("imagenet"):
        assert loaded.raw["optimizer"]["params"]["weight_decay"] == 1e-4  # paper §5.1


def test_the_expected_configurations_are_shipped():
    assert {"demo.json", "imagenet_256.json", "imagenet_8k.json"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize(("name", "kn", "k"), [("imagenet_256", 256, 8), ("imagenet_8k", 8192, 256)])
def test_imagenet_configurations_hold_the_papers_numbers(name, kn, k):
    loaded = config.load(CONFIGS / f"{name}.json")
    assert (loaded.blocks.train_batch_size, loaded.blocks.train_micro_batch_size_per_gpu) == (kn, 32)
    assert batch.resolve(loaded, 1).logical_workers == k
    assert loaded.lr == 0.1
    assert loaded.recipe.reference_batch == 256
    assert loaded.recipe.epochs == 90
    assert loaded.blocks.scheduler.params.milestones == [30, 60, 80]
    assert loaded.blocks.scheduler.params.warmup_epochs == 5
    assert loaded.blocks.scheduler.params.gamma == 0.1
    assert loaded.recipe.model == schema.Model(name="resnet50", zero_init_last=True)
    assert (loaded.recipe.transform.size, loaded.recipe.transform.evaluation_resize) == (224, 256)
    assert loaded.recipe.transform.scale == (0.08, 1.0)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_resolved_configuration_loads_again_to_the_same(path, tmp_path):
    first = config.load(path)
    again = config.load(write(tmp_path, first.resolved()))
    assert again.recipe == first.recipe
    assert again.blocks == first.blocks
    assert again.resolved() == first.resolved()
    assert set(first.resolved()["recipe"]) == set(schema.Recipe.model_fields), "every default is written out"


def test_resolved_configuration_keeps_overrides_that_differ_from_defaults(tmp_path):
    settings = ["recipe.transform.scale=[0.25,1]", "recipe.checkpoint.every_epochs=0.5", "recipe.loader.threads=3"]
    first = config.load(CONFIGS / "imagenet_256.json", settings)
    again = config.load(write(tmp_path, first.resolved()))
    assert again.recipe.transform.scale == (0.25, 1)
    assert again.recipe.checkpoint.every_epochs == 0.5
    assert again.recipe.loader.threads == 3
    assert again.recipe == first.recipe


def test_comments_and_trailing_commas_load_as_in_deepspeed(tmp_path):
    text = (CONFIGS / "imagenet_8k.json").read_text(encoding="utf-8")
    commented = "// the 8k run\n" + text.replace('"seed": 0', '"seed": 0,  # a comment\n')
    assert config.load(write(tmp_path, commented)).recipe == config.load(CONFIGS / "imagenet_8k.json").recipe


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "float16"),
        ({"fp16.enabled": False}, "fp32"),
        ({"fp16": ABSENT}, "fp32"),
        ({"fp16": ABSENT, "bf16.enabled": True}, "bfloat16"),
        ({"fp16": ABSENT, "torch_autocast.enabled": True}, "bfloat16"),
        ({"fp16": ABSENT, "torch_autocast": {"enabled": True, "dtype": "float16"}}, "float16"),
        ({"fp16.enabled": False, "torch_autocast": {"enabled": False, "dtype": "float16"}}, "fp32"),
    ],
)
def test_precision_follows_the_enabled_block(tmp_path, changes, precision):
    assert config.load(write(tmp_path, changed(changes))).precision == precision


def test_run_folder_is_named_after_the_file_unless_given():
    assert config.load(CONFIGS / "demo.json").run_folder == Path("runs/demo")
    assert config.load(CONFIGS / "demo.json", ["recipe.run=out/x"]).run_folder == Path("out/x")


# ---------------------------------------------------------------- the file itself


def test_missing_file_names_the_near_one():
    assert str(CONFIGS / "imagenet_8k.json") in refusal(CONFIGS / "imagenet_8.json")
    assert "there is no such configuration file" in refusal(CONFIGS / "zzz.json")
    assert "there is no such configuration file" in refusal(CONFIGS / "no-folder" / "x.json")


def test_folder_or_binary_instead_of_a_file(tmp_path):
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00{}")
    assert "cannot be read" in refusal(tmp_path / "binary.json")


@pytest.mark.parametrize("text", ["{", '{"train_batch_size": }', '{"a": 1} trailing', '{"train_batch_size" 3}'])
def test_broken_json_says_where(tmp_path, text):
    assert "not valid JSON" in refusal(write(tmp_path, text))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_number_that_json_does_not_have_is_refused(tmp_path, text):
    values = json.dumps(changed({"optimizer.params.lr": 12345})).replace("12345", text)
    assert str(tmp_path) in refusal(write(tmp_path, values))


def test_list_instead_of_an_object(tmp_path):
    assert "a configuration is a JSON object, this is a list" in refusal(write(tmp_path, "[1, 2]"))


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"train_batch_size": 8192,', '"train_batch_size": 8192, "train_batch_size": 256,', "train_batch_size"),
        ('"lr": 0.1,', '"lr": 0.1, "lr": 3.2,', "lr"),
        ('"seed": 0', '"seed": 0, "epochs": 1', "epochs"),
        ('"milestones": [30, 60, 80],', '"milestones": [30, 60, 80], "milestones": [],', "milestones"),
    ],
)
def test_duplicate_key_at_any_depth(tmp_path, old, new, key):
    text = (CONFIGS / "imagenet_8k.json").read_text(encoding="utf-8")
    assert old in text
    message = refusal(write(tmp_path, text.replace(old, new)))
    assert f'the key "{key}" appears twice in one object' in message
    assert "Remove one of them." in message


# ---------------------------------------------------------------- unknown and missing keys


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_batchsize": 8192}, ['unknown top-level key "train_batchsize"', 'did you mean "train_batch_size"?']),
        ({"trian_micro_batch_size_per_gpu": 32}, ['did you mean "train_micro_batch_size_per_gpu"?']),
        ({"gradient_cliping": 0.0, "gradient_clipping": ABSENT}, ['did you mean "gradient_clipping"?']),
        ({"recipes": {}}, ['unknown top-level key "recipes"', 'did you mean "recipe"?']),
        ({"imagenet": {}}, ['unknown top-level key "imagenet"', "DeepSpeed would ignore it"]),
        ({"epochs": 90}, ['unknown top-level key "epochs"', "recipe.epochs"]),
        ({"model": {"name": "resnet50"}}, ['unknown top-level key "model"', "recipe.model"]),
        ({"recipe.epoch": 90}, ['recipe: unknown key "epoch"; did you mean "epochs"?']),
        ({"recipe.model.nam": "x"}, ['recipe.model: unknown key "nam"; did you mean "name"?']),
        ({"recipe.transform.scales": [0.1, 1]}, ['recipe.transform: unknown key "scales"; did you mean "scale"?']),
        ({"recipe.evaluation.every_epoch": 1}, ['recipe.evaluation: unknown key "every_epoch"', '"every_epochs"?']),
        ({"recipe.checkpoint.kep": 1}, ['recipe.checkpoint: unknown key "kep"; did you mean "keep"?']),
        ({"recipe.loader.thread": 1}, ['recipe.loader: unknown key "thread"; did you mean "threads"?']),
        ({"recipe.logging.record_sample": True}, ["recipe.logging: unknown key", 'did you mean "record_samples"?']),
        ({"recipe.zzz": 1}, ['recipe: unknown key "zzz"']),
        ({"scheduler.params.warmup_epoch": 5}, ['scheduler.params: unknown key "warmup_epoch"', '"warmup_epochs"?']),
        ({"scheduler.parms": {}}, ['scheduler: unknown key "parms"; did you mean "params"?']),
        ({"optimizer.param": {}}, ['optimizer: unknown key "param"; did you mean "params"?']),
        ({"optimizer.params.momentun": 0.9}, ['optimizer.params: unknown key "momentun"; did you mean "momentum"?']),
        ({"optimizer.params.max_grad_norm": 1}, ['optimizer.params: unknown key "max_grad_norm"', "SGD takes lr, "]),
        ({"fp16.enable": True}, ['fp16: unknown key "enable"; did you mean "enabled"?']),
        ({"bf16.enable": True}, ['bf16: unknown key "enable"; did you mean "enabled"?']),
        ({"torch_autocast.type": "bf16"}, ['torch_autocast: unknown key "type"; did you mean "dtype"?']),
        ({"tensorboard.enable": True}, ['tensorboard: unknown key "enable"; did you mean "enabled"?']),
        ({"wandb.projects": "x"}, ['wandb: unknown key "projects"; did you mean "project"?']),
        ({"csv_monitor.output": "x"}, ['csv_monitor: unknown key "output"', '"output_path"?']),
        ({"comet.api_keys": "x"}, ['comet: unknown key "api_keys"; did you mean "api_key"?']),
        ({"comms_logger.prof": True}, ['comms_logger: unknown key "prof"']),
        ({"flops_profiler.step": 1}, ['flops_profiler: unknown key "step"']),
        ({"timers.troughput": {}}, ['timers: unknown key "troughput"; did you mean "throughput"?']),
        ({"timers.throughput.enable": True}, ['timers.throughput: unknown key "enable"; did you mean "enabled"?']),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_key_is_refused_with_the_key_meant(tmp_path, changes, expected):
    assert_refused(tmp_path, changes, *expected)


def test_every_unknown_key_of_the_recipe_is_named_at_once(tmp_path):
    assert_refused(
        tmp_path,
        {"recipe.epoch": 1, "recipe.transform.sizes": 3},
        'recipe: unknown key "epoch"',
        'recipe.transform: unknown key "sizes"; did you mean "size"?',
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("recipe", ['there is no "recipe" section', "data, model, epochs"]),
        ("recipe.data", ["recipe.data is missing"]),
        ("recipe.model", ["recipe.model is missing"]),
        ("recipe.model.name", ["recipe.model.name is missing"]),
        ("recipe.epochs", ["recipe.epochs is missing"]),
        ("gradient_clipping", ["gradient_clipping is missing", "norm 1.0", 'Write "gradient_clipping": 0.0']),
        ("optimizer", ["optimizer is missing", '"type": "SGD"']),
        ("optimizer.type", ["optimizer.type is missing"]),
        ("optimizer.params", ["optimizer.params is missing"]),
        ("optimizer.params.lr", ["optimizer.params.lr must be a positive number, not null"]),
        ("scheduler", ["scheduler is missing", '"type": "GradualWarmupLR"']),
        ("scheduler.params", ["scheduler.params is missing"]),
    ],
)
def test_missing_key_is_named(tmp_path, path, expected):
    assert_refused(tmp_path, {path: ABSENT}, *expected)


# ---------------------------------------------------------------- wrong types and values


@pytest.mark.parametrize(
    ("path", "value", "given"),
    [
        ("recipe.epochs", "90", '"90"'),
        ("recipe.epochs", True, "true"),
        ("recipe.seed", 1.5, "1.5"),
        ("recipe.seed", True, "true"),
        ("recipe.seed", -1, "-1"),
        ("recipe.reference_batch", 256.5, "256.5"),
        ("recipe.data", 3, "3"),
        ("recipe.model", "resnet50", '"resnet50"'),
        ("recipe.model.name", 50, "50"),
        ("recipe.model.args", [1], "[1]"),
        ("recipe.model.zero_init_last", 1, "1"),
        ("recipe.transform", 224, "224"),
        ("recipe.transform.size", 224.5, "224.5"),
        ("recipe.transform.size", 0, "0"),
        ("recipe.transform.flip", "true", '"true"'),
        ("recipe.transform.crop", "random", '"random"'),
        ("recipe.transform.mean", 0.5, "0.5"),
        ("recipe.transform.mean", [0.5, 0.5, 0.5, 0.5], "[0.5, 0.5, 0.5, 0.5]"),
        ("recipe.evaluation.micro_batch_size", 0, "0"),
        ("recipe.evaluation.every_epochs", 0.5, "0.5"),
        ("recipe.checkpoint.keep", 0, "0"),
        ("recipe.checkpoint.every_epochs", 0, "0"),
        ("recipe.loader.threads", "4", '"4"'),
        ("recipe.logging.record_samples", "yes", '"yes"'),
        ("recipe", [], "[]"),
        ("train_batch_size", "8192", '"8192"'),
        ("train_batch_size", 8192.5, "8192.5"),
        ("train_batch_size", True, "true"),
        ("train_batch_size", "auto", '"auto"'),
        ("train_batch_size", 0, "0"),
        ("train_micro_batch_size_per_gpu", -32, "-32"),
        ("gradient_accumulation_steps", 2.5, "2.5"),
        ("gradient_clipping", "0", '"0"'),
        ("gradient_clipping", None, "null"),
        ("gradient_clipping", False, "false"),
        ("gradient_clipping", -1.5, "-1.5"),
        ("optimizer", "SGD", '"SGD"'),
        ("optimizer.type", 5, "5"),
        ("optimizer.params", [0.1], "[0.1]"),
        ("optimizer.params.weight_decay", "1e-4", "1e-4"),
        ("optimizer.params.weight_decay", None, ""),
        ("optimizer.params.momentum", True, ""),
        ("optimizer.params.nesterov", "true", "true"),
        ("scheduler.params", [], "[]"),
        ("scheduler.params.warmup", "linear", '"linear"'),
        ("scheduler.params.warmup_epochs", "5", '"5"'),
        ("scheduler.params.warmup_epochs", -1, "-1"),
        ("scheduler.params.milestones", 30, "30"),
        ("scheduler.params.gamma", 0, "0"),
        ("fp16.enabled", "true", '"true"'),
        ("fp16.enabled", 1, "1"),
        ("fp16", True, "true"),
        ("fp16.initial_scale_power", 40, "40"),
        ("torch_autocast.dtype", "fp16", '"fp16"'),
        ("optimizer.params.momentum", -0.9, "-0.9"),
        ("optimizer.params.weight_decay", -1e-4, "-0.0001"),
        ("optimizer.params.dampening", -1, "-1"),
        ("optimizer.params.fused", "true", '"true"'),
        ("optimizer.params.fused", 1, "1"),
        ("optimizer.params.foreach", 0, "0"),
        ("tensorboard", True, "true"),
        ("tensorboard.enabled", "yes", '"yes"'),
        ("tensorboard.output_path", 5, "5"),
        ("tensorboard.job_name", None, "null"),
        ("wandb.enabled", 1, "1"),
        ("wandb.team", 3, "3"),
        ("csv_monitor.output_path", ["x"], '["x"]'),
        ("comet.samples_log_interval", 0, "0"),
        ("comet.mode", "new", '"new"'),
        ("comms_logger.prof_ops", "all_reduce", '"all_reduce"'),
        ("flops_profiler.profile_step", 1.5, "1.5"),
        ("flops_profiler.enabled", None, "null"),
        ("flops_profiler.module_depth", "all", '"all"'),
        ("timers", 5, "5"),
        ("timers", None, "null"),
        ("timers.throughput", 3, "3"),
        ("timers.throughput.enabled", "no", '"no"'),
        ("wall_clock_breakdown", "true", '"true"'),
        ("memory_breakdown", 1, "1"),
        ("dump_state", {}, ""),
        ("prescale_gradients", "no", '"no"'),
        ("gradient_predivide_factor", "2", '"2"'),
        ("gradient_predivide_factor", 0, "0"),
        ("steps_per_print", "10", '"10"'),
        ("steps_per_print", -1, "-1"),
        ("steps_per_print", False, "false"),
        ("log_level", "warn", '"warn"'),
        ("log_level", 10, "10"),
        ("communication_data_type", "float16", '"float16"'),
        ("disable_python_gc", 0, "0"),
        ("zero_optimization", None, "null"),
        ("recipe.model.args", {"num_classes": "x"}, '"x"'),
        ("recipe.step", {"tf32": 1}, "1"),
        ("recipe.watchdog", {"withheld_updates": -1}, "-1"),
        ("recipe.model.args", {"num_classes": True}, "true"),
    ],
)
def test_wrong_type_or_range_names_the_path_and_the_value(tmp_path, path, value, given):
    assert_refused(tmp_path, {path: value}, f"{path}", given)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scheduler.params.milestones": [30, "60"]}, ["scheduler.params.milestones.1", '"60"']),
        ({"scheduler.params.milestones": [60, 30]}, ["scheduler.params: milestones must ascend"]),
        ({"scheduler.params.milestones": [30, 30]}, ["scheduler.params: milestones must ascend"]),
        ({"scheduler.params.milestones": [0, 30]}, ["scheduler.params: milestones", "positive"]),
        ({"recipe.transform.mean": [0.5, 0.5]}, ["recipe.transform.mean"]),
        ({"recipe.transform.std": [0.5, 0.5, 0]}, ["recipe.transform: std must be positive"]),
        ({"recipe.transform.scale": [1.0, 0.08]}, ["recipe.transform: scale", "0 < low ≤ high ≤ 1"]),
        ({"recipe.transform.scale": [0.08, 1.1]}, ["recipe.transform: scale"]),
        ({"recipe.transform.scale": [0, 1]}, ["recipe.transform: scale"]),
        ({"recipe.transform.ratio": [2, 1]}, ["recipe.transform: ratio", "width / height"]),
        ({"recipe.transform.size": 288}, ["recipe.transform: evaluation_resize 256 is smaller than size 288"]),
        ({"fp16.hysteresis": 3}, ["fp16: hysteresis", "leave it out"]),
        ({"fp16.min_loss_scale": 2}, ["fp16: min_loss_scale", "leave it out"]),
        ({"fp16.consecutive_hysteresis": True}, ["fp16: consecutive_hysteresis", "leave it out"]),
        ({"bf16.enabled": True}, ["more than one of fp16, bf16 and torch_autocast", "leave all out for fp32"]),
        ({"torch_autocast.enabled": True}, ["more than one of fp16, bf16 and torch_autocast"]),
        ({"zero_optimization": {"stage": 1}}, ["zero_optimization.stage 1", "Use stage 0"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage 2", "could not resume on another"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage 3"]),
        ({"zero_optimization": {"stage": "1"}}, ["zero_optimization.stage"]),
        ({"zero_optimization": True}, ["zero_optimization"]),
        ({"zero_optimization": {"stage": 1}}, ["25 M", "channels_last", "In float16", "none is applied any more"]),
        (
            {
                "zero_optimization": {"stage": 2},
                "fp16": ABSENT,
                "torch_autocast": {"enabled": True, "dtype": "float16"},
            },
            ["zero_optimization.stage 2", "In float16", "scales differ", "Use stage 0"],
        ),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op 'sum'", 'write "mean"']),
        ({"steps_per_print": 0}, ["steps_per_print 0", "divide by zero", "Leave it out."]),
        ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation must stay true"]),
        ({"data_types": {"param_dtype": "bf16"}}, ['"data_types" is not used here', "in half precision"]),
        ({"optimizer.params.lr": 0}, ["optimizer.params.lr must be a positive number, not 0", "reference_batch"]),
        ({"optimizer.params.lr": -0.1}, ["optimizer.params.lr must be a positive number, not -0.1"]),
        ({"optimizer.params.lr": "0.1"}, ['optimizer.params.lr must be a positive number, not "0.1"']),
        ({"optimizer.params.lr": True}, ["optimizer.params.lr must be a positive number, not true"]),
        ({"bfloat16": {"enabled": True}}, ['"bfloat16" is not used here', '"bf16"']),
        ({"pipeline": {"stages": 2}}, ['"pipeline" is not used here', '"recipe"']),
        ({"data_efficiency": {}}, ['"data_efficiency" is not used here', "exact epochs"]),
        ({"tensor_parallel": {}}, ['"tensor_parallel" is not used here', "data-parallel"]),
        ({"autotuning": {"enabled": True}}, ['"autotuning" is not used here', "BN's n"]),
        ({"zero_optimization": {"overlap_comm": True}}, ["zero_optimization.overlap_comm", "stage 0", "Leave it out"]),
        ({"torch_autocast.lower_precision_safe_modules": []}, ["torch_autocast.lower_precision_safe_modules"]),
        ({"optimizer.params.momentum": 0}, ["nesterov needs a positive momentum"]),
        ({"optimizer.params.momentum": ABSENT}, ["nesterov needs a positive momentum"]),
        ({"optimizer.params.dampening": 0.1}, ["nesterov needs", "no dampening"]),
        ({"optimizer.params.differentiable": True}, ["optimizer.params.differentiable", "Leave it out"]),
        ({"optimizer.params": {"lr": 1, "fused": True, "foreach": True}}, ["fused and foreach", "one of them"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1, "fused": True, "foreach": True}}},
            ["fused and foreach", "one of them"],
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1, "torch_adam": False, "fused": True}}},
            ["optimizer.params.fused is torch's", "torch_adam"],
        ),
        (
            {"optimizer.params": {"lr": 1, "momentum": 0.9, "dampening": 0.1, "fused": True}},
            ["optimizer.params.fused", "dampening in float16", "uninitialised", "Leave one of them out"],
        ),
        ({"recipe.step": {"tf32": True}}, ["recipe.step.tf32 has no effect in float16", "Leave recipe.step.tf32 out"]),
        (
            {"recipe.step": {"tf32": True}, "fp16": ABSENT, "bf16": {"enabled": True}},
            ["recipe.step.tf32 has no effect in bfloat16"],
        ),
        ({"optimizer": {"type": "LBFGS", "params": {"lr": 1}}}, ["LBFGS cannot be used", "several times per update"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1, "betas": [0.9, 1.0]}}}, ["betas must be two numbers"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1, "betas": 0.9}}}, ["betas must be two numbers", "0.9"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1, "torch_adam": False, "amsgrad": True}}},
            ["optimizer.params.amsgrad", "DeepSpeed's own AdamW does not take it"],
        ),
        ({"recipe.model.args": {"pretrained": True}}, ["recipe.model.args: pretrained", "recipe.model.start_from"]),
        (
            {"recipe.model.args": {"checkpoint_path": "w"}},
            ["recipe.model.args: checkpoint_path", "recipe.model.start_from"],
        ),
        ({"recipe.model.args": {"in_chans": 1}}, ["recipe.model.args: in_chans", "RGB"]),
        ({"recipe.transform.padding": 5}, ["recipe.transform: padding", 'crop "padded"', 'crop "resized"', "leave"]),
        (
            {"recipe.transform.crop": "padded", "recipe.transform.scale": [0.5, 1]},
            ['recipe.transform: scale is for crop "resized"'],
        ),
        (
            {"recipe.transform.crop": "none", "recipe.transform.ratio": [1, 1]},
            ['recipe.transform: ratio is for crop "resized"'],
        ),
        ({"elasticity": {"enabled": False}}, ['unknown top-level key "elasticity"']),
        ({"amp": {"enabled": True}}, ['unknown top-level key "amp"']),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_setting_that_would_train_something_else_is_refused_with_the_reason(tmp_path, changes, expected):
    assert_refused(tmp_path, changes, *expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"fp16": ABSENT, "bf16": {"enabled": True}},
        {"fp16": ABSENT, "torch_autocast": {"enabled": True}},
        {"fp16": {"enabled": False}, "torch_autocast": {"dtype": "float16"}},
        {"fp16": ABSENT},
    ],
)
def test_zero_is_not_said_to_fail_in_float16_where_that_is_not_asked_for(tmp_path, changes):
    message = refusal(write(tmp_path, changed({"zero_optimization": {"stage": 1}, **changes})))
    assert "float16" not in message and "Use stage 0" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe.step": {"tf32": True}, "fp16": ABSENT},
        {"recipe.step": {"tf32": False}},
        {"optimizer.params": {"lr": 1, "momentum": 0.9, "dampening": 0.1, "fused": True}, "fp16": ABSENT},
        {"optimizer.params": {"lr": 1, "momentum": 0.9, "dampening": 0.1}},
        {"optimizer.params": {"lr": 1, "momentum": 0.9, "fused": True}},
        {"optimizer": {"type": "AdamW", "params": {"lr": 1, "fused": True}}},
        {"recipe.watchdog": {"withheld_updates": 0}},
    ],
)
def test_what_a_precision_allows_loads(tmp_path, changes):
    config.load(write(tmp_path, changed(changes)))


def test_harmless_settings_of_the_refused_kind_load(tmp_path):
    harmless = {
        "zero_optimization": {"stage": 0},
        "gradient_allreduce_op": "mean",
        "steps_per_print": 100,
        "managed_gradient_accumulation": True,
        "gradient_clipping": 1,
        "bf16": {"enabled": False},
        "fp16.hysteresis": 2,
        "tensorboard": {"enabled": True, "output_path": "tb"},
    }
    loaded = config.load(write(tmp_path, changed(harmless)))
    assert loaded.raw["tensorboard"] == {"enabled": True, "output_path": "tb"}
    assert loaded.blocks.gradient_clipping == 1


@pytest.mark.parametrize(
    "key",
    """activation_checkpointing aio checkpoint compile dataloader_drop_last data_types datastates_ckpt disable_allgather
    hybrid_engine seq_parallel_communication_data_type use_data_before_expert_parallelism weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer""".split(),
)
def test_key_of_deepspeed_without_effect_here_is_refused_with_the_reason(tmp_path, key):
    assert_refused(tmp_path, {key: {}}, f'the key "{key}" is not used here', deepspeed_keys.REFUSED_KEYS[key])


def test_values_that_deepspeed_and_torch_take_load(tmp_path):
    changes = {
        "optimizer.params": {"lr": 0.1, "momentum": 0, "foreach": None, "fused": False, "dampening": 0.1},
        "fp16.auto_cast": True,
        "log_level": "info",
        "communication_data_type": "fp16",
        "gradient_predivide_factor": 2,
        "prescale_gradients": True,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": True, "synchronized": False}},
        "wandb": {"enabled": True, "team": None},
        "comms_logger": {"prof_ops": ["all_reduce"]},
        "recipe.transform": {"padding": 4, "crop": "none", "ratio": [3 / 4, 4 / 3]},  # at their defaults
    }
    loaded = config.load(write(tmp_path, changed(changes)))
    assert loaded.blocks.wandb.enabled and loaded.blocks.timers.throughput.enabled
    assert config.load(write(tmp_path, loaded.resolved())).resolved() == loaded.resolved()


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_deepspeeds_warmups_are_refused_with_the_reason(tmp_path, kind):
    assert_refused(
        tmp_path,
        {"scheduler": {"type": kind, "params": {"warmup_num_steps": 782}}},
        f"scheduler.type: '{kind}' cannot be used; the schedule is GradualWarmupLR",
        "counts optimizer steps",
        "the first rate twice",
        "logarithmic",
        '"milestones": [30, 60, 80]',
    )


@pytest.mark.parametrize("kind", ["OneCycle", "LRRangeTest", "MultiStepLR", "gradualwarmuplr", None, 5])
def test_other_schedules_are_refused(tmp_path, kind):
    assert_refused(
        tmp_path,
        {"scheduler.type": kind},
        f"scheduler.type: {kind!r} cannot be used; the schedule is GradualWarmupLR",
        "in epochs and follows the samples consumed",
    )


@pytest.mark.parametrize(
    ("written", "meant"), [("sgd", "SGD"), ("Sgd", "SGD"), ("adamw", "AdamW"), ("ADAM", "Adam"), ("SDG", "SGD")]
)
def test_misspelt_optimizer_names_the_one_meant(tmp_path, written, meant):
    changes = {"optimizer.type": written, "optimizer.params": {"lr": 0.1}}
    assert_refused(tmp_path, changes, "optimizer.type", f'"{written}"', f'did you mean "{meant}"?')


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "NAdam", "Lion", "Muon"])
def test_other_optimizers_of_torch_and_deepspeed_load(tmp_path, kind):
    values = changed({"optimizer": {"type": kind, "params": {"lr": 0.001}}})
    assert config.load(write(tmp_path, values)).blocks.optimizer.type == kind


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_parameters_of_adam_load_with_their_types(tmp_path, kind):
    params = {"lr": 1, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0, "torch_adam": True, "adam_w_mode": False}
    values = changed({"optimizer": {"type": kind, "params": params}})
    assert config.load(write(tmp_path, values)).blocks.optimizer.params == params


# ---------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optimizer.params.lr=0.4", lambda c: c.lr == 0.4),
        ("train_batch_size=256", lambda c: c.blocks.train_batch_size == 256),
        ("recipe.transform.flip=false", lambda c: c.recipe.transform.flip is False),
        ("recipe.model.name=resnet18", lambda c: c.recipe.model.name == "resnet18"),
        ('recipe.data="/data/1"', lambda c: c.recipe.data == "/data/1"),
        ("recipe.data=/data/a=b", lambda c: c.recipe.data == "/data/a=b"),
        ("recipe.run=", lambda c: c.recipe.run == ""),
        ("scheduler.params.milestones=[1, 2.5]", lambda c: c.blocks.scheduler.params.milestones == [1, 2.5]),
        ("recipe.transform.mean=[0.5,0.5,0.5]", lambda c: c.recipe.transform.mean == (0.5, 0.5, 0.5)),
        ("recipe.logging.record_samples=true", lambda c: c.recipe.logging.record_samples is True),
        ('recipe.model.args={"drop_rate": 0.1}', lambda c: c.recipe.model.args == {"drop_rate": 0.1}),
        ("recipe.model.args.drop_rate=0.1", lambda c: c.recipe.model.args == {"drop_rate": 0.1}),
        ("csv_monitor.enabled=true", lambda c: c.raw["csv_monitor"] == {"enabled": True}),
        ("recipe.loader.threads=null", lambda c: c.recipe.loader.threads is None),
    ],
)
def test_override_of_every_kind(override, read):
    loaded = config.load(CONFIGS / "imagenet_8k.json", [override])
    assert read(loaded)
    assert loaded.overrides == (override,)


def test_overrides_apply_in_order_and_leave_the_rest_alone():
    loaded = config.load(CONFIGS / "imagenet_8k.json", ["recipe.epochs=1", "recipe.epochs=2", "recipe.seed=7"])
    assert (loaded.recipe.epochs, loaded.recipe.seed) == (2, 7)
    expected = copy.deepcopy(GOOD)
    expected["recipe"].update(epochs=2, seed=7)
    assert loaded.raw == expected


@pytest.mark.parametrize("override", ["recipe.epochs", "", "=3", "recipe.epochs:3"])
def test_malformed_override_shows_the_form(override):
    message = refusal(CONFIGS / "demo.json", override)
    assert f"--set {override}: not of the form path.to.key=value" in message
    assert "--set optimizer.params.lr=0.4" in message


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train_batch_size.x=1", "train_batch_size"),
        ("recipe.transform.mean.0=0.5", "mean"),
        ("recipe.model.name.x=1", "name"),
    ],
)
def test_override_into_a_value(tmp_path, override, value):
    path = write(tmp_path, changed({"recipe.transform.mean": [0.1, 0.2, 0.3]}))
    assert refusal(path, override) == f'--set {override}: "{value}" is a value, not a section'


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.params.lr=fast", 'optimizer.params.lr must be a positive number, not "fast"'),
        ("recipe.epochs=ninety", 'recipe.epochs: input should be a valid number, not "ninety"'),
        ("recipe.epoch=90", 'recipe: unknown key "epoch"; did you mean "epochs"?'),
        ("recipes.epochs=90", 'unknown top-level key "recipes"; did you mean "recipe"?'),
        ("recipe..epochs=90", "recipe: unknown key"),
        ("scheduler.type=WarmupLR", "scheduler.type: 'WarmupLR' cannot be used"),
        ("gradient_clipping=null", "gradient_clipping is missing"),
        ("train_batch_size=8192.0", "train_batch_size: input should be a valid integer, not 8192.0"),
        ('train_batch_size="8192"', 'train_batch_size: input should be a valid integer, not "8192"'),
        ("recipe.transform.flip=True", 'recipe.transform.flip: input should be a valid boolean, not "True"'),
        ("optimizer.params.lr=NaN", "optimizer.params.lr"),
        ("optimizer.params.lr=Infinity", "optimizer.params.lr"),
        ("recipe.epochs=Infinity", "recipe.epochs"),
        ("recipe.epochs=NaN", "recipe.epochs"),
        ("recipe.checkpoint.every_epochs=Infinity", "recipe.checkpoint.every_epochs"),
        ("scheduler.params.warmup_epochs=Infinity", "scheduler.params.warmup_epochs"),
        ("scheduler.params.milestones=[30,Infinity]", "scheduler.params.milestones"),
        ("gradient_clipping=Infinity", "gradient_clipping"),
    ],
)
def test_overrides_are_checked_like_the_file(override, expected):
    message = refusal(CONFIGS / "imagenet_8k.json", override)
    assert message.startswith(f"{CONFIGS / 'imagenet_8k.json'}: ")
    assert expected in message


# ---------------------------------------------------------------- against the installed DeepSpeed and torch

READ_WITHOUT_EFFECT = {
    "vocabulary_size",  # a warning about tensor-core alignment and nothing else
    "sequence_parallel_size",  # divides the world size: sequence parallelism
}


class Recording(dict):
    """A configuration that notes which of its keys are asked for."""

    def __init__(self, values: dict[str, Any], asked: set[str]) -> None:
        super().__init__(values)
        self.asked = asked

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return Keys(self)

    def __copy__(self):
        return Recording(self, self.asked)


class Keys:
    def __init__(self, owner: Recording) -> None:
        self.owner = owner

    def __contains__(self, key):
        return key in self.owner

    def __iter__(self):
        return dict.__iter__(self.owner)


@pytest.fixture(scope="module")
def keys_deepspeed_reads() -> tuple[set[str], set[str]]:
    """(keys that DeepSpeed's own parser asks for at top level, those among them that it only rejects)."""
    from deepspeed.runtime import config as deepspeed_config

    asked: set[str] = set()
    deepspeed_config.DeepSpeedConfig(Recording({"train_batch_size": 8, "gradient_clipping": 0.0}, asked))
    return asked, set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)


def test_every_top_level_key_that_deepspeed_reads_is_known(keys_deepspeed_reads):
    asked, removed = keys_deepspeed_reads
    assert len(asked) > 50, "the recording works"
    assert asked - removed - READ_WITHOUT_EFFECT - deepspeed_keys.DEEPSPEED_KEYS == set()


def test_every_known_key_is_read_by_deepspeed(keys_deepspeed_reads):
    asked, removed = keys_deepspeed_reads
    assert deepspeed_keys.DEEPSPEED_KEYS - asked == set(), "these would be accepted and have no effect"
    assert deepspeed_keys.DEEPSPEED_KEYS & removed == set()
    assert set(deepspeed_keys.REFUSED_KEYS) <= deepspeed_keys.DEEPSPEED_KEYS


def test_recipe_is_no_key_of_deepspeed(keys_deepspeed_reads):
    assert "recipe" not in keys_deepspeed_reads[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_deepspeed_loads_file_and_resolved_configuration_as_they_are(path, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    loaded = config.load(path)
    sizes = batch.resolve(loaded, 1)
    resolved = write(tmp_path, {**loaded.resolved(), **sizes.deepspeed()})
    for file in (resolved,) if loaded.bases else (path, resolved):  # DeepSpeed does not know extends
        theirs = DeepSpeedConfig(str(file))
        assert theirs.gradient_clipping == loaded.blocks.gradient_clipping
        assert theirs.optimizer_name.lower() == loaded.blocks.optimizer.type.lower()
        assert theirs.scheduler_name == "GradualWarmupLR"
        assert theirs.gradient_allreduce_op == "mean"
        assert theirs.zero_optimization_stage == 0
        assert (theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu) == (sizes.train, sizes.micro)
        assert theirs.gradient_accumulation_steps == sizes.accumulation


def test_fp16_defaults_are_deepspeeds():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config

    theirs = DeepSpeedFP16Config()
    for name, value in deepspeed_schema.Float16Block().model_dump().items():
        assert getattr(theirs, name) == value, name
    assert set(deepspeed_schema.BFloat16Block.model_fields) <= set(DeepSpeedBF16Config.model_fields)


def deepspeeds_sections() -> dict[str, Any]:
    """Defaults of DeepSpeed's own classes, by the name of ours."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "TensorBoardBlock": TensorBoardConfig().model_dump(),
        "WandbBlock": WandbConfig().model_dump(),
        "CsvMonitorBlock": CSVConfig().model_dump(),
        "CometBlock": CometConfig().model_dump(),
        "CommsLoggerBlock": CommsLoggerConfig().model_dump(),
        "FlopsProfilerBlock": vars(DeepSpeedFlopsProfilerConfig({})),
        "ThroughputTimerBlock": DeepSpeedThroughputTimerConfig().model_dump(),
    }


def test_sections_that_are_passed_on_have_deepspeeds_fields_and_defaults():
    for name, theirs in deepspeeds_sections().items():
        assert getattr(deepspeed_schema, name)().model_dump() == theirs, name


def test_defaults_of_single_keys_are_deepspeeds():
    from deepspeed.runtime.config import DeepSpeedConfig

    values = {"train_batch_size": 8, "gradient_clipping": 0.0}
    theirs = DeepSpeedConfig(dict(values))
    ours = deepspeed_schema.DeepSpeedBlocks.model_fields
    names = (
        "communication_data_type disable_python_gc dump_state gradient_allreduce_op gradient_predivide_factor "
        "log_level managed_gradient_accumulation memory_breakdown prescale_gradients steps_per_print "
        "wall_clock_breakdown"
    )
    for name in names.split():
        assert ours[name].default == getattr(theirs, name), name


def test_names_of_log_levels_and_types_are_deepspeeds():
    from deepspeed.runtime.config import get_communication_data_type
    from deepspeed.utils.logging import log_levels

    fields = deepspeed_schema.DeepSpeedBlocks.model_fields
    assert set(get_args(get_args(fields["log_level"].annotation)[0])) == set(log_levels)
    types = get_args(get_args(fields["communication_data_type"].annotation)[0])
    assert len({get_communication_data_type({"communication_data_type": name}) for name in types}) == len(types)


def test_parameters_of_sgd_are_torchs():
    import torch

    known = deepspeed_keys.OPTIMIZER_PARAMS["SGD"].split()
    assert set(known) == set(inspect.signature(torch.optim.SGD).parameters) - {"params"}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_parameters_of_adam_are_torchs_or_deepspeeds(name):
    import torch
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime.config import ADAM_W_MODE, TORCH_ADAM_PARAM

    known = set(deepspeed_keys.OPTIMIZER_PARAMS[name].split())
    of_torch = set(inspect.signature(getattr(torch.optim, name)).parameters)
    of_fused = set(inspect.signature(FusedAdam).parameters)
    assert known - of_torch - {ADAM_W_MODE, TORCH_ADAM_PARAM} == set()
    assert {"lr", "betas", "eps", "weight_decay", "amsgrad", ADAM_W_MODE, TORCH_ADAM_PARAM} <= known
    assert (of_torch & of_fused) - {"params"} <= known, "what both implementations take"


def test_config_is_immutable():
    loaded = config.load(CONFIGS / "demo.json")
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.path = Path("x")
    with pytest.raises(ValueError, match="frozen"):
        loaded.recipe.epochs = 1


@pytest.mark.parametrize(
    ("stuck", "compiled", "patience"), [(600, False, 600), (600, True, 3600), (0, True, 0), (9999, True, 9999)]
)
def test_compiling_is_given_an_hour_before_it_counts_as_stuck(tmp_path, stuck, compiled, patience):
    path = write(tmp_path, changed({"recipe.watchdog.stuck_seconds": stuck, "recipe.step": {"compile": compiled}}))
    assert config.load(path).watchdog.stuck_seconds == patience
