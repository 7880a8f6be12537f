"""The only module that imports deepspeed: it resolves the JSON into what trains right, and runs updates.

Traps of DeepSpeed 0.19 that are closed here (docs/precision.md has the measurements):

- the `fp16` block at ZeRO stage 0 divides gradients by a loss scale that it never multiplied in, and both half
  precision blocks cast BN's weights; the blocks become `torch_autocast` with our loss scaler settings;
- a C++ extension that CPU training does not use is compiled at start-up, for two minutes;
- the throughput timer synchronises the device twice per micro-batch unless disabled;
- at stage 0 gradients are copied into one buffer and out of it again, after the backward pass and on one rank too:
  `pipeline.overlap` averages them instead.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read while deepspeed is imported

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import lr_schedules

from pipeline import checkpoint, precise_bn, rendezvous
from pipeline.batch_norm import LogicalWorkerStatistics, average_statistics, make_ghosts
from pipeline.ema import WeightAverage
from pipeline.feed import Copier, Normalise
from pipeline.float32 import allow_tf32
from pipeline.layer_wise import make_optimizer
from pipeline.loader import MicroBatch
from pipeline.loss import training_loss
from pipeline.meeting import choose_interface, connect, meet
from pipeline.mixing import KeyedMixup
from pipeline.model import parameter_groups
from pipeline.overflow import OverflowCounter, Overflows
from pipeline.overlap import GradientAverager
from pipeline.plan import Plan
from pipeline.reader import raise_open_files
from pipeline.schedule import GradualWarmupLR
from pipeline.schema import Watchdog
from pipeline.stochastic import is_stochastic, seed_worker
from pipeline.transfer import frozen_norms, with_body_rate
from pipeline.watch import Watch
from shards.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(days=30)
"""The watch ends what hangs."""

JOINING_SECONDS = 120.0
"""How long connecting the ranks with each other may take without getting further."""


@dataclass(frozen=True)
class World:
    """This process among the ranks, and its part in the watch over them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    watch: Watch

    @property
    def local_ranks(self) -> range:
        """The ranks on this host, which every launcher numbers one after the other by default."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)


def join(world_size: int | None = None) -> World:
    """Join the ranks that a launcher started (deepspeed, torchrun, Slurm, MPI), or be a group of one.

    Args:
        world_size: the number of ranks that was planned, checked against the launcher's; None for any.

    Raises:
        UserError: what the launcher says of the ranks cannot be used.
        RankError: not all of them came.
        RuntimeError: the launcher started another number of ranks.
    """
    # built by DeepSpeed for inference on CPUs only, but compiled whenever the CPU is the accelerator
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    place = rendezvous.discover(os.environ)
    if world_size is not None and place.size != world_size:
        raise RuntimeError(f"{world_size} ranks were planned, {place.size} were started")
    cuda = get_accelerator().device_name() == "cuda"  # DS_ACCELERATOR=cpu is honoured
    if cuda:
        torch.cuda.set_device(place.local_rank)  # the first collective already needs it
    choose_interface(place)
    # the watch ends a rank whose peer is gone, when it is known which one; NCCL would abort it before that
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    raise_open_files()  # rank 0 has two connections to every rank
    store = meet(place)
    watch = Watch(
        connect(place),
        place.rank,
        place.size,
        place.local_rank,
        watchdog=Watchdog(stuck_seconds=JOINING_SECONDS),
        # what else starts a rank may end before it, as a shell does under nohup
        parent=os.getppid() if place.launcher in ("deepspeed", "torchrun") else None,
    )
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=place.rank, world_size=place.size, timeout=COLLECTIVE_TIMEOUT
    )
    # DeepSpeed reads them, and takes the group as it is
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port),
    )
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    watch.be_patient(Watchdog())
    watch.at("setting up")
    return World(
        rank=place.rank,
        size=place.size,
        local_rank=place.local_rank,
        local_size=place.local_size,
        device=torch.device("cuda", place.local_rank) if cuda else torch.device("cpu"),
        watch=watch,
    )


def leave(world: World) -> None:
    """Leave the ranks in good order, all together: none is missed while another still saves or writes."""
    torch.distributed.barrier()
    world.watch.close()
    torch.distributed.destroy_process_group()


def deepspeed_config(plan: Plan, device: str = "cpu") -> dict[str, Any]:
    """What `deepspeed.initialize` gets: the user's JSON with the batch triangle and the precision resolved.

    Args:
        plan: the resolved run.
        device: "cuda" or "cpu"; on CUDA, SGD, Adam and AdamW are fused unless the JSON chooses an implementation.
    """
    config = deepcopy(plan.config.raw)
    recipe = plan.config.recipe
    del config["recipe"]
    config.update(plan.batch.for_engine())
    for block in ("fp16", "bf16"):
        config.pop(block, None)
    if plan.config.precision != "fp32":
        config["torch_autocast"] = {**config.get("torch_autocast", {}), "enabled": True, "dtype": plan.config.precision}
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    if config["optimizer"]["type"] in ("Adam", "AdamW"):
        config["optimizer"]["params"].setdefault("torch_adam", True)  # DeepSpeed's own is compiled at start-up
    if device == "cuda":
        _prefer_fused(config["optimizer"])
    if plan.config.layer_wise:
        del config["optimizer"]  # it is made here
    config["scheduler"]["params"].update(
        lr=plan.config.lr,
        reference_batch=recipe.reference_batch,
        train_batch_size=plan.batch.train,
        samples_per_epoch=plan.train_samples,
        epochs=recipe.epochs,
        scaling=recipe.scaling,
    )
    return config


def _prefer_fused(optimizer: dict[str, Any]) -> None:
    """One kernel for all weights, which skips by itself: an unfused optimizer has the scaler wait at each update."""
    params = optimizer["params"]
    torchs = optimizer["type"] == "SGD" or params.get("torch_adam")
    # SGD's first update is not damped, and that of momentum which begins at zero would be
    if torchs and "foreach" not in params and not params.get("dampening"):
        params.setdefault("fused", True)


class Engine:
    """A model under DeepSpeed: one call per update.

    Args:
        model: a timm model on the CPU; it is moved to the device.
        plan: the resolved run.
        world: this process among the ranks.
    """

    def __init__(self, model: nn.Module, plan: Plan, world: World) -> None:
        lr_schedules.GradualWarmupLR = GradualWarmupLR  # where DeepSpeed looks up "scheduler": {"type": …}
        self.plan = plan
        self.world = world
        allow_tf32(plan.config.recipe.step.tf32)
        self._stochastic = is_stochastic(model)
        groups = parameter_groups(model, vectors_decay=not plan.config.layer_wise)
        groups = with_body_rate(groups, model, plan.config.recipe.model.body_lr)
        model = model.to(world.device)
        ema = plan.config.recipe.model.ema
        self.average = WeightAverage(model, ema) if ema is not None else None  # a copy, which DeepSpeed has no part in
        try:
            self._engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
                model=model,
                model_parameters=groups,
                optimizer=make_optimizer(plan.config.blocks.optimizer),
                config=deepspeed_config(plan, world.device.type),
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{plan.config.path}: DeepSpeed refuses the configuration: {error}") from error
        assert isinstance(self.scheduler, GradualWarmupLR)
        # not before: initialize views every parameter as contiguous bytes
        self.model: nn.Module = self._engine.module.to(memory_format=torch.channels_last)
        if self.average is not None:
            self.average.model.to(memory_format=torch.channels_last)
        recipe = plan.config.recipe
        self._copy = Copier(world.device)
        self._normalise = Normalise(recipe.transform.mean, recipe.transform.std).to(world.device)
        if plan.batch.together > 1 or recipe.step.compile:
            make_ghosts(self.model, plan.batch.together)
        self._float16 = plan.config.precision == "float16"
        self._statistics = LogicalWorkerStatistics(self.model, plan.batch.passes, keep_finite=self._float16)
        self._frozen_norms = frozen_norms(self.model)
        self._averager = (
            GradientAverager(self.model.parameters()) if plan.averages_gradients and world.size > 1 else None
        )
        if recipe.step.compile:
            self._compile(len(recipe.transform.sizes))
        self._mixup = KeyedMixup(recipe.mixing, self.model.num_classes, recipe.seed) if recipe.mixing else None
        self._loss = training_loss(recipe.loss)
        self._overflows = OverflowCounter(self.optimizer)
        self._lr_used = float("nan")
        self._configure_loss_scale()
        self._fill_fused_momentum()

    @property
    def copied_on(self) -> torch.cuda.Stream | None:
        """The stream that images and labels are copied to the device on; None on a CPU."""
        return self._copy.stream

    @property
    def loss_scale(self) -> float | None:
        """The current loss scale, or None where the precision needs none. Reading it waits for the device."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        return scaler.get_scale() if scaler is not None else None

    @property
    def skipped_steps(self) -> int:
        """Updates that were not applied because a gradient overflowed. Reading it waits for the device."""
        return self._overflows.withheld

    def take_overflows(self) -> Overflows:
        """The withheld updates, and the longest streak of them since the last call. Waits for the device."""
        return self._overflows.take()

    @property
    def lr_used(self) -> float:
        """The learning rate that the optimizer held at the last update, applied or withheld; the classifier's."""
        return self._lr_used

    def take_communicated(self) -> float:
        """Seconds since the last call that updates stood still for other ranks' gradients; NaN if not measured.

        The device's work must have been waited for.
        """
        if self.world.size == 1:
            return 0.0
        return self._averager.take_waited() if self._averager is not None else float("nan")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (n, 3, size, size) on any device → logits (n, classes), in the run's precision."""
        return self._engine(self._normalise(self._copy(images)))

    def update(self, micro_batches: Iterator[MicroBatch], samples: int) -> tuple[torch.Tensor, list[np.ndarray]]:
        """One update from this rank's k/W logical workers.

        The loss is the mean over each micro-batch; DeepSpeed divides by accumulation and ranks, so the gradient is
        the 1/(kn) average of the whole minibatch (the paper's third remark).

        Args:
            micro_batches: taken from as many times as there are passes; each has the images of
                `plan.batch.together` logical workers, one after the other.
            samples: the update's position in the stream, which decides the learning rate.

        Returns:
            float64 sums (loss, correct, images) over this rank's micro-batches, on the device and not waited for;
            and the sample ids of each logical worker. A mixed image is correct as the class with the larger share
            in it.
        """
        try:
            return self._update(micro_batches, samples)
        except torch.OutOfMemoryError as error:
            sizes = self.plan.batch
            mend = "Use half precision (docs/precision.md); smaller images or micro-batches are another recipe."
            if sizes.together > 1:
                fewer = f"--set recipe.step.ghost_batches={sizes.together // 2}"
                mend = f"Send fewer logical workers through the model at once, which trains the same: {fewer}"
            raise UserError(
                f"{self.plan.config.path}: the device has not the memory for {sizes.physical} images at once: "
                f"{str(error).splitlines()[0]}",
                mend,
            ) from error

    def _update(self, micro_batches: Iterator[MicroBatch], samples: int) -> tuple[torch.Tensor, list[np.ndarray]]:
        self.scheduler.seek(samples)
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        ids: list[np.ndarray] = []
        sizes = self.plan.batch
        number = samples // sizes.train
        self._engine.train()
        for layer in self._frozen_norms:
            layer.eval()
        if self._averager is not None:
            self._averager.begin()
        with self._statistics.update():
            for index in range(sizes.passes):
                batch = next(micro_batches)
                ids += np.split(batch.ids, sizes.together)  # and not the batch: its memory is for the next one
                self._statistics.micro_step(index)
                worker = self.world.rank * sizes.accumulation + index * sizes.together
                if self._stochastic:
                    seed_worker(self.plan.config.recipe.seed, number, worker)
                labels = self._copy(batch.labels)
                images, targets = self._normalise(self._copy(batch.images)), labels
                if self._mixup is not None:
                    images, targets = self._mix(images, labels, number, worker)
                    labels = targets.argmax(dim=1)
                logits = self._engine(images).float()
                loss = self._loss(logits, targets)
                with torch.no_grad():
                    count = len(labels)
                    correct = (logits.argmax(dim=1) == labels).sum()
                    sums += torch.stack(
                        [loss.double() * count, correct.double(), torch.full_like(loss, count).double()]
                    )
                self._backward(loss, last=index == sizes.passes - 1)
                self._lr_used = self.optimizer.param_groups[0]["lr"]
                self._engine.step()
        self._overflows.attempted()
        if self.average is not None:
            self.average.update(self.model, number + 1)
        return sums, ids

    def evaluation_mode(self) -> None:
        """Use running statistics; the next `update` goes back to training."""
        self._engine.eval()

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Around what shall see the average of the weights in their place; for a recipe that has one."""
        assert self.average is not None
        return self.average.in_place_of(self.model)

    def average_statistics(self) -> None:
        """Have all ranks hold the means over the ranks of BN's running statistics; every rank calls it."""
        average_statistics(self.model)
        if self.average is not None:
            average_statistics(self.average.model)

    def recompute_statistics(self, batches: Iterable[MicroBatch]) -> None:
        """Replace BN's running statistics by those of the present weights over this rank's batches of training images.

        For `average_statistics` after it. The training does not depend on them; the model is left in evaluation mode.
        """
        self._engine.eval()
        with self._statistics.single_passes():
            precise_bn.recompute(self.model, self.forward, batches, leave_out_overflows=self._float16)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights and position: optimizer tensors, loss scale, averaged weights."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        return {
            "optimizer": self.optimizer.state_dict()["state"],
            "parameters": self._parameter_names(),
            # some count updates in their groups, all of which have the same number
            "step": next((group["step"] for group in self.optimizer.param_groups if "step" in group), None),
            "loss_scaler": scaler.state_dict() if scaler is not None else None,
            **({checkpoint.AVERAGE: self.average.model.state_dict()} if self.average is not None else {}),
        }

    def restore(self, state: dict[str, Any], *, samples: int, step: int) -> None:
        """Continue from `state` at a position. Hyper-parameters stay those of the configuration."""
        groups = self.optimizer.state_dict()["param_groups"]
        if state.get("step") is not None:
            # to each its own: a tensor that is counted up in place
            groups = [{**group, "step": deepcopy(state["step"])} for group in groups]
        tensors = state["optimizer"]
        if "parameters" in state:  # other groups of them, or other frozen ones, number them in another way
            numbers = {name: number for number, name in enumerate(self._parameter_names())}
            saved = {name: tensors[number] for number, name in enumerate(state["parameters"]) if number in tensors}
            tensors = {numbers[name]: value for name, value in saved.items() if name in numbers}
        self.optimizer.load_state_dict({"state": tensors, "param_groups": groups})
        self._fill_fused_momentum()  # what was saved may be older than the first update that was applied
        scaler = self._engine.torch_autocast_z0_gradscaler
        scale = state["loss_scaler"]
        if scaler is not None and scale and not self.plan.config.blocks.fp16.loss_scale:
            found = {key: scale[key] for key in ("scale", "_growth_tracker")}
            scaler.load_state_dict({**scaler.state_dict(), **found})
        # without one in the checkpoint, it begins with the weights that were loaded from there
        if self.average is not None and checkpoint.AVERAGE in state:
            self.average.load(state[checkpoint.AVERAGE])
        self.scheduler.load_state_dict({"samples": samples})
        self._engine.global_steps = step
        self._engine.global_samples = samples

    def write_events(self, values: dict[str, float], samples: int) -> None:
        """Hand scalars to the JSON's own monitors (tensorboard, csv_monitor, wandb, comet); x axis is samples."""
        if self._engine.monitor.enabled:
            self._engine.monitor.write_events([(name, value, samples) for name, value in values.items()])

    def _parameter_names(self) -> list[str]:
        """What is trained, in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _mix(
        self, images: torch.Tensor, labels: torch.Tensor, update: int, worker: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix the images of each logical worker, `worker` and those after it, among themselves."""
        assert self._mixup is not None
        micro = self.plan.batch.micro
        mixed = [
            self._mixup(*part, update, worker + number)
            for number, part in enumerate(zip(images.split(micro), labels.split(micro), strict=True))
        ]
        return torch.cat([part for part, _ in mixed]), torch.cat([targets for _, targets in mixed])

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add to the gradients; after the last pass they are averages over the ranks."""
        averager = self._averager
        if last and averager is not None:
            averager.last_pass()
        ours = self.plan.averages_gradients
        with self._engine.no_sync() if ours else contextlib.nullcontext():  # DeepSpeed has nothing to do between ranks
            self._engine.backward(loss)
        if last and averager is not None:
            averager.finish()
        elif last and ours:
            for parameter in self.model.parameters():  # as on several ranks, where a part is averaged that has none
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)

    def _compile(self, sizes: int) -> None:
        """Compile model and normalisation, once for each size of images, in training and in evaluation."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * sizes)
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would go on uncompiled, and say so in a log
        # and not the module as it is called, as engine.compile does: DeepSpeed's hooks around it count micro-steps, and
        # every one of them would be compiled anew
        self.model.forward = torch.compile(self.model.forward, dynamic=False)
        self._normalise.compile(dynamic=False)

    def _configure_loss_scale(self) -> None:
        """Give the scaler the `fp16` block's settings; DeepSpeed makes it with torch's defaults."""
        block = self.plan.config.blocks.fp16
        if not block.enabled or self._engine.torch_autocast_z0_gradscaler is None:
            return
        device = self.world.device.type
        if block.loss_scale:
            # a fixed scale: never grown, and shrunk by a factor that rounds away in the scaler's float32
            scaler = torch.amp.GradScaler(
                device, init_scale=block.loss_scale, backoff_factor=1 - 2**-53, growth_interval=2**31 - 1
            )
        else:
            scaler = torch.amp.GradScaler(
                device, init_scale=2.0**block.initial_scale_power, growth_interval=block.loss_scale_window
            )
        self._engine.torch_autocast_z0_gradscaler = scaler

    def _fill_fused_momentum(self) -> None:
        """Zero momentum that the fused kernel would otherwise leave uninitialised if the first step overflows."""
        if self._engine.torch_autocast_z0_gradscaler is None:
            return
        for group in self.optimizer.param_groups:
            if group.get("fused") and group.get("momentum"):
                for parameter in group["params"]:
                    state = self.optimizer.state[parameter]
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
