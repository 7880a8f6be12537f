"""What a configuration file may contain: the `recipe` section in full, and the DeepSpeed keys that decide training.

The file is a DeepSpeed config plus one section of ours, `recipe`. DeepSpeed ignores top-level keys it does not
know, so a misspelt one would silently train something else; here every key is known or it is an error.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DEEPSPEED_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt
    disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine
    log_level managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)
"""Top-level keys of DeepSpeed 0.19 (deepspeed/runtime/config.py); none other has an effect."""

REFUSED_KEYS = {
    "bfloat16": 'DeepSpeed renamed it: write "bf16"',
    "pipeline": "it is pipeline parallelism, which this data-parallel trainer does not use; "
    'our own settings go into "recipe"',
    "data_efficiency": "it samples and routes data itself, which would break exact epochs",
    "hybrid_engine": "it is for language-model inference during training",
    "tensor_parallel": "the trainer is data-parallel only",
    "expert_parallel": "the trainer is data-parallel only",
    "autotuning": "it tunes the micro-batch, which is BN's n and part of the recipe",
}

OPTIMIZER_PARAMS = {
    "SGD": "lr momentum dampening weight_decay nesterov maximize foreach differentiable fused",
    "Adam": "lr betas eps weight_decay amsgrad torch_adam adam_w_mode foreach",
    "AdamW": "lr betas eps weight_decay amsgrad torch_adam adam_w_mode foreach",
}
"""Parameters of the optimizers we know by heart; the parameters of others are checked when they are built."""

OPTIMIZER_SWITCHES = frozenset("nesterov maximize differentiable amsgrad torch_adam adam_w_mode".split())
OPTIMIZER_NUMBERS = frozenset("momentum dampening weight_decay eps".split())

OTHER_OPTIMIZERS = frozenset(
    """
    ASGD Adadelta Adafactor Adagrad Adamax LBFGS Lamb Lion MuAdam MuAdamW MuSGD Muon NAdam RAdam RMSprop Rprop
    """.split()
)
"""What DeepSpeed or torch has besides; whether their parameters fit is found when they are built."""

STEP_COUNTING_SCHEDULES = frozenset({"WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"})


class Section(BaseModel):
    """A strictly typed section: unknown keys, and numbers written as strings, are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# ---------------------------------------------------------------- DeepSpeed's own sections that we read


class OptimizerBlock(Section):
    """`optimizer`: DeepSpeed's block. `params.lr` is the rate at `recipe.reference_batch`."""

    type: str
    params: dict[str, Any]


class ScheduleParams(Section):
    """`scheduler.params` of `GradualWarmupLR`; everything is counted in epochs (paper §2.2 and §5.1)."""

    warmup: Literal["gradual", "constant", "none"] = "gradual"
    warmup_epochs: float = Field(5, ge=0)
    milestones: list[float] = Field(default_factory=list)
    gamma: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _ascending(self) -> ScheduleParams:
        if any(later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError("milestones must ascend")
        if self.milestones and self.milestones[0] <= 0:
            raise ValueError("milestones are epochs after the start: they must be positive")
        return self


class SchedulerBlock(Section):
    """`scheduler`: DeepSpeed's block, with the one schedule that counts samples."""

    type: Literal["GradualWarmupLR"]
    params: ScheduleParams


class Float16Block(Section):
    """`fp16`: DeepSpeed's block, trained as autocast to float16 with a loss scaler (docs/precision.md)."""

    enabled: bool = False
    loss_scale: float = Field(0, ge=0, description="0 is dynamic")
    initial_scale_power: int = Field(16, ge=0, le=32)
    loss_scale_window: int = Field(1000, gt=0)
    hysteresis: int = Field(2, ge=1)
    consecutive_hysteresis: bool = False
    min_loss_scale: float = Field(1, gt=0)
    auto_cast: bool = False

    @model_validator(mode="after")
    def _honoured(self) -> Float16Block:
        # torch's scaler has neither; at DeepSpeed's defaults they change nothing that matters
        for key, default in (("hysteresis", 2), ("consecutive_hysteresis", False), ("min_loss_scale", 1)):
            if getattr(self, key) != default:
                raise ValueError(f"{key} has no counterpart in the loss scaler that is used: leave it out")
        return self


class BFloat16Block(Section):
    """`bf16`: DeepSpeed's block, trained as autocast to bfloat16 (docs/precision.md)."""

    enabled: bool = False


class AutocastBlock(Section):
    """`torch_autocast`: DeepSpeed's block, used as it is."""

    enabled: bool = False
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    lower_precision_safe_modules: list[str] | None = None


class DeepSpeedBlocks(BaseModel):
    """The DeepSpeed keys whose values this trainer depends on; the others go to DeepSpeed as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    train_batch_size: int | None = Field(None, gt=0)
    train_micro_batch_size_per_gpu: int | None = Field(None, gt=0)
    gradient_accumulation_steps: int | None = Field(None, gt=0)
    gradient_clipping: float = Field(ge=0)
    optimizer: OptimizerBlock
    scheduler: SchedulerBlock
    fp16: Float16Block = Float16Block()
    bf16: BFloat16Block = BFloat16Block()
    torch_autocast: AutocastBlock = AutocastBlock()


# ---------------------------------------------------------------- the recipe


class Model(Section):
    """A timm model by name. Residual networks get the paper's initialisation (§5.1), others keep their own."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of timm.create_model")
    zero_init_last: bool = Field(True, description="γ = 0 in each residual block's last BN (ResNets only)")


class Transform(Section):
    """How an image becomes `size` × `size` pixels, in training and in evaluation."""

    size: int = Field(224, gt=0)
    crop: Literal["resized", "padded", "none"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = Field(4, ge=0, description="pixels on each side; crop = padded only")
    flip: bool = True
    evaluation_resize: int = Field(256, gt=0, description="short side before the centre crop of `size`")
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        # JSON has no tuples, and strict mode takes nothing else for one
        if isinstance(values, dict):
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return values

    @model_validator(mode="after")
    def _ordered(self) -> Transform:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError("scale must be two shares of the image's area, 0 < low ≤ high ≤ 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("ratio must be two aspect ratios (width / height), 0 < low ≤ high")
        if self.evaluation_resize < self.size:
            raise ValueError(f"evaluation_resize {self.evaluation_resize} is smaller than size {self.size}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


class Evaluation(Section):
    """When and how the whole validation split is measured."""

    split: str = "val"
    every_epochs: int = Field(1, ge=1)
    micro_batch_size: int | None = Field(None, gt=0, description="default: the training micro-batch")


class Checkpoints(Section):
    """When the run is saved, and how many saves are kept."""

    every_epochs: float = Field(1, gt=0, description="may be a part of an epoch")
    keep: int = Field(3, ge=1)


class Loader(Section):
    """Reading and decoding, per rank. None of it changes a pixel or the order."""

    threads: int | None = Field(None, ge=1, description="default: this rank's share of the cores")
    prefetch: int = Field(4, ge=1, description="micro-batches decoded ahead")


class Logging(Section):
    """What the run writes down."""

    every_steps: int = Field(20, ge=1)
    record_samples: bool = Field(False, description="write every consumed sample id and the LR used, per rank")


class Recipe(Section):
    """Everything that DeepSpeed has no key for."""

    data: str
    model: Model
    epochs: float = Field(gt=0)
    reference_batch: int = Field(256, gt=0, description="the batch that optimizer.params.lr is for (paper §2.1)")
    seed: int = Field(0, ge=0, lt=2**63)
    run: str | None = Field(None, description="run folder; default runs/<name of the config>")
    transform: Transform = Transform()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    loader: Loader = Loader()
    logging: Logging = Logging()
