"""What DeepSpeed's part of a configuration file may contain: every key that has an effect here, strictly typed.

DeepSpeed ignores top-level keys that it does not know, reads many without looking at their type, and fails on others
only in the ranks. The tests compare the fields here with those of the installed DeepSpeed.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.schema import ScheduleParams, Section

# ---------------------------------------------------------------- what decides the training


class OptimizerBlock(Section):
    """`optimizer`: DeepSpeed's block. `params.lr` is the rate at `recipe.reference_batch`."""

    type: str
    params: dict[str, Any]


class SchedulerBlock(Section):
    """`scheduler`: DeepSpeed's block, with the one schedule that counts samples."""

    type: Literal["GradualWarmupLR"]
    params: ScheduleParams


class Float16Block(Section):
    """`fp16`: DeepSpeed's block, trained as autocast to float16 with a loss scaler (docs/precision.md).

    `auto_cast` may be either: autocast casts the inputs itself, which is what the key asks for.
    """

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
            if self.enabled and getattr(self, key) != default:
                raise ValueError(f"{key} has no counterpart in the loss scaler that is used: leave it out")
        return self


class BFloat16Block(Section):
    """`bf16`: DeepSpeed's block, trained as autocast to bfloat16 (docs/precision.md)."""

    enabled: bool = False


class AutocastBlock(Section):
    """`torch_autocast`: DeepSpeed's block, used as it is."""

    enabled: bool = False
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


class ZeroBlock(Section):
    """`zero_optimization`: stage 0, where none of its other keys has an effect."""

    stage: Literal[0] = 0


# ---------------------------------------------------------------- what is measured and written down


class TensorBoardBlock(Section):
    """`tensorboard`: curves as TensorBoard's event files."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class WandbBlock(Section):
    """`wandb`: curves to Weights & Biases."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CsvMonitorBlock(Section):
    """`csv_monitor`: curves as CSV files."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class CometBlock(Section):
    """`comet`: curves to Comet."""

    enabled: bool = False
    samples_log_interval: int = Field(100, gt=0)
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: Literal["get", "create", "get_or_create"] | None = None


class CommsLoggerBlock(Section):
    """`comms_logger`: what the collectives cost."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = Field(default_factory=list)
    verbose: bool = False
    debug: bool = False


class FlopsProfilerBlock(Section):
    """`flops_profiler`: what each module costs, at one step."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: int = Field(1, ge=1)
    module_depth: int = Field(-1, ge=-1)
    top_modules: int = Field(1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class ThroughputTimerBlock(Section):
    """`timers.throughput`: off unless it is enabled, because it synchronises the device twice per micro-batch."""

    enabled: bool = True
    synchronized: bool = True


class TimersBlock(Section):
    """`timers`: DeepSpeed's block, which has one timer."""

    throughput: ThroughputTimerBlock = ThroughputTimerBlock()


class DeepSpeedBlocks(Section):
    """All of the file but `recipe`. A null is taken where it is DeepSpeed's own default, and nowhere else."""

    train_batch_size: int | None = Field(None, gt=0)
    train_micro_batch_size_per_gpu: int | None = Field(None, gt=0)
    gradient_accumulation_steps: int | None = Field(None, gt=0)
    managed_gradient_accumulation: bool = True
    gradient_clipping: float = Field(ge=0)
    optimizer: OptimizerBlock
    scheduler: SchedulerBlock
    fp16: Float16Block = Float16Block()
    bf16: BFloat16Block = BFloat16Block()
    torch_autocast: AutocastBlock = AutocastBlock()
    zero_optimization: ZeroBlock = ZeroBlock()

    # how the gradients are averaged: rounding, not what is averaged
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    gradient_allreduce_op: Literal["mean"] = "mean"
    gradient_predivide_factor: float = Field(1.0, gt=0)
    prescale_gradients: bool = False

    tensorboard: TensorBoardBlock = TensorBoardBlock()
    wandb: WandbBlock = WandbBlock()
    csv_monitor: CsvMonitorBlock = CsvMonitorBlock()
    comet: CometBlock = CometBlock()
    comms_logger: CommsLoggerBlock = CommsLoggerBlock()
    flops_profiler: FlopsProfilerBlock = FlopsProfilerBlock()
    timers: TimersBlock = TimersBlock()
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    steps_per_print: int | None = Field(None, gt=0)
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    disable_python_gc: bool = False
