"""Which of DeepSpeed's keys are used, which are refused and why, and what their values must be to train right."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from typing import Any, TypeGuard

from pipeline import schema
from pipeline.deepspeed_schema import DeepSpeedBlocks, OptimizerBlock, ZeroBlock
from shards.errors import UserError

REFUSED_KEYS = {
    "bfloat16": 'DeepSpeed renamed it: write "bf16"',
    "pipeline": "it is pipeline parallelism, which this data-parallel trainer does not use; "
    'our own settings go into "recipe"',
    "data_efficiency": "it samples and routes data itself, which would break exact epochs",
    "hybrid_engine": "it is for language-model inference during training",
    "tensor_parallel": "the trainer is data-parallel only",
    "expert_parallel": "the trainer is data-parallel only",
    "autotuning": "it tunes the micro-batch, which is BN's n and part of the recipe",
    "data_types": "it would keep BN or its statistics in half precision; weights, BN and the optimizer stay in fp32 "
    "in every precision",
    # no effect here
    "activation_checkpointing": "no timm model calls deepspeed.checkpointing, so it has no effect",
    "aio": "it is for ZeRO's offloading to NVMe, and ZeRO is not used",
    "checkpoint": "checkpoints are the trainer's own, set by recipe.checkpoint",
    "compile": "it has no effect by itself: recipe.step.compile compiles the model",
    "dataloader_drop_last": "the data loader is the trainer's own, and drops nothing",
    "datastates_ckpt": "checkpoints are the trainer's own, set by recipe.checkpoint",
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "seq_parallel_communication_data_type": "it is for sequence parallelism; the trainer is data-parallel only",
    "use_data_before_expert_parallelism": "it is for mixtures of experts; the trainer is data-parallel only",
    "weight_quantization": "it is for inference",
    "zero_allow_untested_optimizer": "it is for ZeRO, which is not used",
    "zero_force_ds_cpu_optimizer": "it is for ZeRO's offloading, and ZeRO is not used",
}
"""Keys of DeepSpeed 0.19 that would break the recipe or do nothing, and why."""

DEEPSPEED_KEYS = frozenset(DeepSpeedBlocks.model_fields) | frozenset(REFUSED_KEYS)
"""Top-level keys of DeepSpeed 0.19 (deepspeed/runtime/config.py); none other has an effect."""

OPTIMIZER_PARAMS = {
    "SGD": "lr momentum dampening weight_decay nesterov maximize foreach differentiable fused",
    "Adam": "lr betas eps weight_decay amsgrad torch_adam adam_w_mode foreach fused",
    "AdamW": "lr betas eps weight_decay amsgrad torch_adam adam_w_mode foreach fused",
    "Lars": "lr momentum dampening weight_decay nesterov trust_coeff eps trust_clip always_adapt",
    "Lamb": "lr betas eps weight_decay bias_correction grad_averaging trust_clip always_adapt",
}
"""Parameters of the optimizers we know by heart; the parameters of others are checked when they are built."""

LAYER_WISE = frozenset({"Lars", "Lamb"})
"""timm's, with a rate for each layer (`layer_wise`)."""

OPTIMIZER_SWITCHES = frozenset(
    """
    nesterov maximize differentiable amsgrad torch_adam adam_w_mode bias_correction grad_averaging trust_clip
    always_adapt
    """.split()
)
OPTIMIZER_CHOICES = frozenset("foreach fused".split())  # null leaves them to torch
OPTIMIZER_NUMBERS = frozenset("momentum dampening weight_decay eps trust_coeff".split())

OTHER_OPTIMIZERS = frozenset(
    """
    ASGD Adadelta Adafactor Adagrad Adamax Lion MuAdam MuAdamW MuSGD Muon NAdam RAdam RMSprop Rprop
    """.split()
)
"""What DeepSpeed or torch has besides; whether their parameters fit is found when they are built."""

FLOAT16_WITH_ZERO = (
    "In float16 it does not train either: where a gradient overflows, ZeRO's stages 1 and 2 skip the update before the "
    "loss scaler has seen it, so the scale stays, the next one overflows too, and none is applied any more. With "
    "compute_grad_norm false each rank looks at its own part of the gradients alone, and the ranks' scales differ."
)
"""What DeepSpeed 0.19 does with torch_autocast in float16, which the `fp16` block becomes, beside ZeRO."""

STEP_COUNTING_SCHEDULES = frozenset({"WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"})


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown key: `; did you mean "X"?`, or nothing where none is near."""
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def check_top_level(place: str, raw: dict[str, Any]) -> None:
    """Every key is used, and what must be written is.

    Args:
        place: what messages begin with: the file.
        raw: the whole configuration.

    Raises:
        UserError: a key is unknown, refused or missing.
    """
    known = {*DeepSpeedBlocks.model_fields, "recipe"}
    for key in raw:
        if key in REFUSED_KEYS:
            raise UserError(f'{place}: the key "{key}" is not used here', REFUSED_KEYS[key])
        if key not in known:
            mend = (
                [f'It belongs inside "recipe": recipe.{key}']
                if key in schema.Recipe.model_fields
                else ["DeepSpeed would ignore it without a word, and train something else than is written."]
            )
            raise UserError(f'{place}: unknown top-level key "{key}"{did_you_mean(key, known)}', *mend)
    if "recipe" not in raw:
        raise UserError(
            f'{place}: there is no "recipe" section',
            "It names what DeepSpeed has no key for: data, model, epochs. "
            "ds_configs/demo.json is the smallest example.",
        )
    if "gradient_clipping" not in raw:
        raise UserError(
            f"{place}: gradient_clipping is missing",
            "DeepSpeed clips gradients at norm 1.0 where the key is absent, which the paper does not.",
            'Write "gradient_clipping": 0.0 for none.',
        )
    if "optimizer" not in raw:
        raise UserError(
            f"{place}: optimizer is missing",
            'Example: "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": true}}',
        )
    _check_scheduler_type(place, raw.get("scheduler"))


def _check_scheduler_type(place: str, scheduler: Any) -> None:
    example = (
        'Example: "scheduler": {"type": "GradualWarmupLR", "params": {"warmup": "gradual", "warmup_epochs": 5, '
        '"milestones": [30, 60, 80]}}'
    )
    if scheduler is None:
        raise UserError(f"{place}: scheduler is missing", example)
    kind = scheduler.get("type") if isinstance(scheduler, dict) else scheduler
    if kind == "GradualWarmupLR":
        return
    why = [
        "The recipe's schedule is in epochs and follows the samples consumed, so that it is the same at any "
        "batch size, number of ranks and after any resume; this one counts optimizer steps."
    ]
    if kind in STEP_COUNTING_SCHEDULES and str(kind).startswith("Warmup"):
        why.append(
            "DeepSpeed's warmups also apply the first rate twice, reach the peak one step late, and are "
            "logarithmic unless told otherwise."
        )
    raise UserError(f"{place}: scheduler.type: {kind!r} cannot be used; the schedule is GradualWarmupLR", *why, example)


def check_values(place: str, raw: dict[str, Any]) -> None:
    """The values that would break the recipe, refused with the reason; types are `deepspeed_schema`'s matter.

    Raises:
        UserError: ZeRO, a summed gradient, or a value that DeepSpeed itself trips over.
    """
    zero = raw.get("zero_optimization")
    # DeepSpeed still reads a bare true as stage 1
    stage = zero.get("stage", 0) if isinstance(zero, dict) else int(bool(zero))
    if stage != 0:
        raise UserError(
            f"{place}: zero_optimization.stage {stage} is not supported",
            *([FLOAT16_WITH_ZERO] if _asks_for_float16(raw) else []),
            "ZeRO ties checkpoints to the number of ranks, so a run could not resume on another; its flat buffers rule "
            "out channels_last, which convolutions are fastest in; and a model of ImageNet size (ResNet-50 has 25 M "
            "parameters) gains nothing from it.",
            "Use stage 0, or leave the section out.",
        )
    idle = sorted(set(zero) - set(ZeroBlock.model_fields)) if isinstance(zero, dict) else []
    if idle:
        raise UserError(
            f"{place}: zero_optimization.{idle[0]} is for ZeRO's stages 1 to 3, and stage 0 is used", "Leave it out."
        )
    autocast = raw.get("torch_autocast")
    if isinstance(autocast, dict) and "lower_precision_safe_modules" in autocast:
        raise UserError(
            f"{place}: torch_autocast.lower_precision_safe_modules has no effect here",
            "It decides the types that ZeRO communicates in, and ZeRO is not used. Leave it out.",
        )
    if raw.get("gradient_allreduce_op", "mean") != "mean":
        raise UserError(
            f"{place}: gradient_allreduce_op {raw['gradient_allreduce_op']!r} multiplies the update by the ranks",
            'The gradient is the average over the minibatch (paper §2.1): write "mean", or leave it out.',
        )
    steps_per_print = raw.get("steps_per_print", 1)
    if steps_per_print == 0 and not isinstance(steps_per_print, bool):
        raise UserError(f"{place}: steps_per_print 0 makes DeepSpeed divide by zero", "Leave it out.")
    if raw.get("managed_gradient_accumulation", True) is not True:
        raise UserError(
            f"{place}: managed_gradient_accumulation must stay true",
            "The trainer accumulates as many micro-batches as the batch sizes say.",
        )


def _asks_for_float16(raw: dict[str, Any]) -> bool:
    """Whether a configuration whose types nobody has looked at enables a block that trains in float16."""
    fp16, autocast = raw.get("fp16"), raw.get("torch_autocast")
    in_autocast = isinstance(autocast, dict) and bool(autocast.get("enabled")) and autocast.get("dtype") == "float16"
    return in_autocast or (isinstance(fp16, dict) and bool(fp16.get("enabled")))


def check_precision(place: str, precision: str, optimizer: OptimizerBlock, *, tf32: bool) -> None:
    """What else is asked for is possible in this precision, and has an effect.

    Args:
        place: what messages begin with: the file.
        precision: `Config.precision`.
        optimizer: the validated block.
        tf32: recipe.step.tf32.

    Raises:
        UserError: TF32 where nothing computes in float32, or a fused optimizer that an overflow would change.
    """
    if tf32 and precision != "fp32":
        raise UserError(
            f"{place}: recipe.step.tf32 has no effect in {precision}",
            f"Convolutions and matrix products, which it is for, compute in {precision} there; the rest stays in fp32.",
            "Leave recipe.step.tf32 out, or the half precision block.",
        )
    params = optimizer.params
    if precision == "float16" and optimizer.type == "SGD" and params.get("fused") and params.get("dampening"):
        raise UserError(
            f"{place}: optimizer.params.fused cannot be used with dampening in float16",
            "Where the first update overflows, torch's fused SGD leaves its momentum uninitialised. So it begins at "
            "zero here, and dampening would make the first update smaller than unfused SGD's.",
            "Leave one of them out.",
        )


def check_optimizer(place: str, optimizer: OptimizerBlock) -> None:
    """The optimizer exists, and its parameters are what it takes: torch would refuse them in the ranks only.

    Raises:
        UserError: an unknown type or parameter, or values that contradict each other.
    """
    name, params = optimizer.type, optimizer.params
    _check_optimizer_type(place, name)
    if name in OPTIMIZER_PARAMS:
        known = OPTIMIZER_PARAMS[name].split()
        for key in params:
            if key not in known:
                raise UserError(
                    f'{place}: optimizer.params: unknown key "{key}"{did_you_mean(key, known)}',
                    f"{name} takes {', '.join(known)}.",
                )
    for key, value in params.items():
        where, given = f"{place}: optimizer.params.{key}", json.dumps(value)
        if key in OPTIMIZER_SWITCHES and not isinstance(value, bool):
            raise UserError(f"{where} must be true or false, not {given}")
        if key in OPTIMIZER_CHOICES and not (value is None or isinstance(value, bool)):
            raise UserError(f"{where} must be true, false, or null for torch's own choice, not {given}")
        if key in OPTIMIZER_NUMBERS and not (_is_number(value) and value >= 0):
            raise UserError(f"{where} must be a number, 0 or more, not {given}")
        if key == "betas" and not (
            isinstance(value, list) and len(value) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in value)
        ):
            raise UserError(f"{where} must be two numbers, 0 ≤ β < 1, not {given}")
    lr = params.get("lr")
    if not _is_number(lr) or lr <= 0:
        raise UserError(
            f"{place}: optimizer.params.lr must be a positive number, not {json.dumps(lr)}",
            "It is the rate at recipe.reference_batch; the linear scaling rule makes the rate used from it.",
        )
    if params.get("fused") and params.get("foreach"):
        raise UserError(
            f"{place}: optimizer.params: fused and foreach are two implementations of one update", "Enable one of them."
        )
    if name in LAYER_WISE:
        _check_layer_wise(f"{place}: optimizer.params", name, params)
    if name in ("SGD", "Lars"):
        _check_sgd(f"{place}: optimizer.params", params)
    elif name in OPTIMIZER_PARAMS and params.get("torch_adam") is False:
        for key in ("amsgrad", "foreach", "fused"):
            if params.get(key) is not None:
                raise UserError(
                    f"{place}: optimizer.params.{key} is torch's, and DeepSpeed's own {name} does not take it",
                    "Leave torch_adam out, or make it true.",
                )


def _check_optimizer_type(place: str, name: str) -> None:
    if name.lower() == "lbfgs":
        raise UserError(
            f"{place}: optimizer.type: LBFGS cannot be used",
            "It evaluates the loss several times per update, which DeepSpeed's engine does not offer it.",
        )
    names = {known.lower(): known for known in (*OPTIMIZER_PARAMS, *OTHER_OPTIMIZERS)}
    if name not in names.values():
        near = difflib.get_close_matches(name.lower(), names, n=1)
        meant = f'; did you mean "{names[near[0]]}"?' if near else ""
        raise UserError(f'{place}: optimizer.type: unknown optimizer "{name}"{meant}')


def _check_sgd(where: str, params: dict[str, Any]) -> None:
    """What torch.optim.SGD refuses, as far as it depends on more than one parameter."""
    if params.get("nesterov") and (not params.get("momentum") or params.get("dampening")):
        raise UserError(
            f"{where}.nesterov needs a positive momentum and no dampening",
            'The recipe\'s: "momentum": 0.9, "nesterov": true',
        )
    if params.get("differentiable"):
        raise UserError(f"{where}.differentiable is for differentiating through an update", "Leave it out.")


def _check_layer_wise(where: str, name: str, params: dict[str, Any]) -> None:
    """That layers get rates of their own, which timm gives to what decays."""
    if not params.get("weight_decay") and not params.get("always_adapt"):
        raise UserError(
            f"{where}.weight_decay must be given with {name}: only what decays gets a rate of its own",
            "Write a positive one, or always_adapt true for rates of all parameters, normalisation's too.",
        )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
