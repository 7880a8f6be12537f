"""The resolved run as numbers and as a page: what will be trained, said before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rich import filesize

from pipeline import batch as batch_sizes
from pipeline import dataset, rungs
from pipeline.batch import Batch
from pipeline.config import Config
from pipeline.dataset import AnySplit
from pipeline.order import Order, SampleStream
from pipeline.rungs import Rung
from pipeline.schedule import Schedule, exact
from pipeline.window import WindowThenUniform
from shards.errors import UserError
from shards.fetch import mask
from shards.remote import RemoteSplit

SCALING_PAGE = {
    "linear": "linear scaling rule, Goyal et al. §2.1",
    "square_root": "square root scaling rule, not the paper's",
    "none": "not scaled",
}
PRECISION_PAGE = {
    "fp32": "fp32 throughout, without TF32",
    "tf32": "fp32; convolutions and matrix products in TF32, ten bits of mantissa, on GPUs that have it",
    "float16": "autocast float16 + dynamic loss scale; weights, BN, loss and optimizer in fp32",
    "bfloat16": "autocast bfloat16; weights, BN, loss and optimizer in fp32",
}


@dataclass(frozen=True)
class Plan:
    """A configuration resolved against a world size and a data set.

    Attributes:
        config: the validated file.
        batch: the sizes of one update.
        schedule: the learning rate at any position.
        order: the sample at any position.
        train_samples: N.
        val_samples: images of the validation split, or None when no data set was at hand.
        shards: shard counts of both splits, and bytes of the tars where the index says; or None likewise.
        residence: what a host that had all streams would need in its cache; None where nothing is cached in windows.
        digest: digest of the training split's index, or None likewise.
        rungs: the decoders of this host that the run uses, the live one first; or None likewise.
        crop_indexes: training shards that have a crop index; None where the shards are not files of this host.
    """

    config: Config
    batch: Batch
    schedule: Schedule
    order: SampleStream
    train_samples: int
    val_samples: int | None = None
    shards: dict[str, int | None] | None = None
    residence: dataset.Residence | None = None
    digest: str | None = None
    rungs: tuple[Rung, ...] | None = None
    crop_indexes: int | None = None

    @property
    def averages_gradients(self) -> bool:
        """Whether `pipeline.overlap` averages the gradients; else it is DeepSpeed, with what is asked of it."""
        blocks = self.config.blocks
        plain = blocks.communication_data_type in (None, "fp32") and not blocks.prescale_gradients
        watched = blocks.comms_logger.enabled or blocks.wall_clock_breakdown
        return self.config.recipe.step.overlap and plain and blocks.gradient_predivide_factor == 1 and not watched

    @property
    def steps_per_epoch(self) -> Fraction:
        """Updates per epoch; an epoch may end inside an update."""
        return Fraction(self.train_samples, self.batch.train)

    @property
    def total_samples(self) -> Fraction:
        """Samples that the configured epochs ask for."""
        return exact(self.config.recipe.epochs) * self.train_samples

    @property
    def steps(self) -> int:
        """Updates of the whole run; the last may reach past its end by part of a batch."""
        return math.ceil(self.total_samples / self.batch.train)

    @property
    def precise_updates(self) -> int:
        """Whole updates whose images BN's statistics are recomputed over before an evaluation; 0 if they are not."""
        return math.ceil(self.config.recipe.evaluation.precise_bn / self.batch.train)

    @property
    def loss(self) -> str | None:
        """What training minimises, for people; None for plain cross entropy."""
        recipe = self.config.recipe
        section = recipe.loss
        smoothing = recipe.mixing.label_smoothing if recipe.mixing is not None else section.label_smoothing
        if section.kind == "cross_entropy" and not smoothing:
            return None
        parts = ["binary cross entropy" if section.kind == "binary_cross_entropy" else "cross entropy"]
        parts += [f"label smoothing {smoothing:g}"] if smoothing else []
        parts += [f"targets above {section.target_threshold:g} are 1"] if section.target_threshold is not None else []
        return ", ".join(parts)

    def epoch(self, samples: int) -> float:
        """The position `samples` in epochs."""
        return samples / self.train_samples

    def summary(self) -> dict[str, Any]:
        """The plan as plain numbers, for `--json` and for the run's record."""
        recipe = self.config.recipe
        return {
            "config": str(self.config.path),
            "overrides": [mask(override) for override in self.config.overrides],
            "model": recipe.model.name,
            "train_samples": self.train_samples,
            "val_samples": self.val_samples,
            "epochs": recipe.epochs,
            "seed": recipe.seed,
            "world_size": self.batch.world_size,
            "train_batch_size": self.batch.train,
            "micro_batch": self.batch.micro,
            "logical_workers": self.batch.logical_workers,
            "accumulation": self.batch.accumulation,
            "workers_at_once": self.batch.together,
            "reference_lr": float(self.schedule.reference_lr),
            "reference_batch": recipe.reference_batch,
            "peak_lr": float(self.schedule.peak_lr),
            "lr_updates": [{"update": update, "lr": lr} for update, lr in self._key_updates()],
            "steps_per_epoch": float(self.steps_per_epoch),
            "steps": self.steps,
            "milestones": [
                {"epoch": float(epoch), "update": self._update_at(epoch), "lr": self._lr_at(epoch)}
                if self._reached(epoch)
                else {"epoch": float(epoch), "update": None, "lr": None}
                for epoch in self.schedule.milestones
            ],
            "order": self.order.name,
            "decoder": self.rungs[0] if self.rungs else None,
            "precision": self._precision,
            "loss": self.loss,
            "index_digest": self.digest,
            "run": str(self.config.run_folder),
            "deepspeed": {**self._masked(), **self.batch.deepspeed()},
        }

    def _masked(self) -> dict[str, Any]:
        """The configuration as it may be shown: what a URL holds besides its address may be a secret."""
        resolved = self.config.resolved()
        recipe = resolved["recipe"]
        return {
            **resolved,
            "recipe": {**recipe, **{key: mask(recipe[key]) for key in ("data", "stream") if recipe[key]}},
        }

    def page(
        self, *, ranks: str = "", model_lines: list[tuple[str, str]] | None = None, resume: str = ""
    ) -> list[tuple[str, str]]:
        """The plan for people: (label, text) rows; the first row's label is the experiment's name.

        Args:
            ranks: where the ranks are, e.g. "4 hosts × 8".
            model_lines: rows that need the built model (`model.describe`), placed where they belong.
            resume: what the run goes on from (`resume.outlook`).
        """
        config, batch, schedule = self.config, self.batch, self.schedule
        recipe = config.recipe
        images = f"{self.train_samples:,} train"
        if self.val_samples is not None:
            images += f" / {self.val_samples:,} {recipe.evaluation.split}"
        overrun = (self.steps * batch.train - self.total_samples) / batch.train
        reaches = (
            f" · the last reaches past epoch {recipe.epochs:g} by {float(overrun):.2g} of a batch" if overrun else ""
        )
        rows = [
            (config.name, f"{recipe.model.name} · {images} · {recipe.epochs:g} epochs · {config.path}"),
            *([("extends", " → ".join(base.name for base in reversed(config.bases)))] if config.bases else []),
            (
                "batch",
                f"{batch.train:,} = {batch.micro} micro-batch × {batch.accumulation} accumulation × "
                f"{batch.world_size} rank{'s' * (batch.world_size != 1)}{f' ({ranks})' if ranks else ''} · "
                f"{batch.logical_workers} logical workers of n = {batch.micro}"
                + (f", {batch.together} at once in {batch.passes} passes" if batch.together > 1 else ""),
            ),
            ("steps", f"{float(self.steps_per_epoch):,.2f} per epoch · {self.steps:,} in all{reaches}"),
            (
                "rate",
                f"{float(schedule.reference_lr):g} per {recipe.reference_batch} → peak {float(schedule.peak_lr):g} "
                f"(× {float(schedule.peak_lr / schedule.reference_lr):g}) · {SCALING_PAGE[recipe.scaling]}",
            ),
            ("", self._warmup_line()),
        ]
        rows += [("", line) for line in (*self._milestone_lines(), *self._decay_lines())]
        rows += self._transfer_rows()
        decay = config.blocks.optimizer.params.get("weight_decay", 0)
        if config.layer_wise:
            name = config.blocks.optimizer.type.upper()
            rows.append(("", f"{name}: of each weight by its norm and its update's · not in the paper's recipe"))
        if clipping := config.blocks.gradient_clipping:
            rows.append(("", f"gradients of norm above {clipping:g} are clipped to it · not in the paper's recipe"))
        spared = (
            "every weight, and no bias" if config.layer_wise else "every weight and bias except normalisation's γ and β"
        )
        rows += model_lines or [("decay", f"{decay:g} on {spared}")]
        rows += [
            ("precision", self._precision_line()),
            *self._step_rows(),
            ("order", f"{self.order.name}, seed {recipe.seed}: every image once per epoch, any number of ranks"),
            *([] if isinstance(self.order, Order) else [("", self._locality_line())]),
            *self._augmentation_rows(),
            *([("loss", f"{self.loss} · in training alone · not in the paper's recipe")] if self.loss else []),
            ("data", self._data_line()),
            *self._evaluation_rows(),
            (
                "saves",
                f"every {recipe.checkpoint.every_epochs:g} epoch{'s' * (recipe.checkpoint.every_epochs != 1)}, "
                f"keep {recipe.checkpoint.keep} → {config.run_folder}",
            ),
            *([("resume", resume)] if resume else []),
        ]
        return rows

    def _update_at(self, epoch: Fraction) -> int:
        return self.schedule.first_update_at(epoch, self.batch.train)

    def _lr_at(self, epoch: Fraction) -> float:
        return self.schedule.lr(self._update_at(epoch) * self.batch.train)

    def _reached(self, epoch: Fraction) -> bool:
        """Whether any update of the run begins at or after `epoch`."""
        return self._update_at(epoch) < self.steps

    def _key_updates(self) -> list[tuple[int, float]]:
        """(update, LR) where the rate starts, reaches its peak, steps, and ends."""
        updates = {0, self.steps - 1, *(self._update_at(epoch) for epoch in self.schedule.milestones)}
        if self.schedule.warms_up:
            peak = self._update_at(self.schedule.warmup_epochs)
            updates |= {1, peak - 1, peak}
        return [(u, self.schedule.lr(u * self.batch.train)) for u in sorted(updates) if 0 <= u < self.steps]

    def _warmup_line(self) -> str:
        schedule = self.schedule
        peak = float(schedule.peak_lr)
        if not schedule.warms_up:
            why = "warmup none" if schedule.warmup == "none" else "nothing to warm up: the batch is not scaled up"
            return f"update 0 … {peak:g} · {why}"
        last = min(self._update_at(schedule.warmup_epochs), self.steps) - 1
        if not self._reached(schedule.warmup_epochs):
            low, high = (self.schedule.lr(update * self.batch.train) for update in (0, last))
            return (
                f"update 0 … {last:,} {low:g} → {high:.6g} · {float(schedule.warmup_epochs):g} epochs, "
                f"{schedule.warmup} · {peak:g} is {self._never_reached}"
            )
        how = "in equal increments per update" if schedule.warmup == "gradual" else f"held, then {peak:g}"
        low = float(schedule.warmup_lr)
        rates = f"{low:g} → {peak:g}" if schedule.warmup == "gradual" else f"{low:g}"
        return f"update 0 … {last:,} {rates} {how} · {float(schedule.warmup_epochs):g} epochs, {schedule.warmup}"

    def _milestone_lines(self) -> list[str]:
        reached = [epoch for epoch in self.schedule.milestones if self._reached(epoch)]
        missed = [epoch for epoch in self.schedule.milestones if not self._reached(epoch)]
        lines = []
        if reached:
            rates = " / ".join(f"{self._lr_at(epoch):.6g}" for epoch in reached)
            updates = " / ".join(f"{self._update_at(epoch):,}" for epoch in reached)
            lines.append(f"epoch {_epochs(reached)} → {rates} · at updates {updates}")
        if missed:
            lines.append(f"epoch {_epochs(missed)} {self._never_reached}")
        return lines

    def _decay_lines(self) -> list[str]:
        schedule = self.schedule
        if schedule.decay in ("steps", "constant"):
            return []
        begin = schedule.warmup_epochs if schedule.warms_up else Fraction(0)
        shape = f"polynomial of power {float(schedule.power):g}" if schedule.decay == "polynomial" else schedule.decay
        last = schedule.lr((self.steps - 1) * self.batch.train)
        return [
            f"epoch {float(begin):g} … {float(schedule.epochs):g} → {float(schedule.final_lr):g} · {shape} · "
            f"the last update's is {last:.3g}"
        ]

    @property
    def _never_reached(self) -> str:
        return f"never reached: the run ends at epoch {self.config.recipe.epochs:g}"

    @property
    def _precision(self) -> str:
        return "tf32" if self.config.recipe.step.tf32 else self.config.precision

    def _precision_line(self) -> str:
        blocks = self.config.blocks
        block = "fp16" if blocks.fp16.enabled else "bf16" if blocks.bf16.enabled else None
        text = PRECISION_PAGE[self._precision]
        if blocks.fp16.enabled and blocks.fp16.loss_scale:
            text = text.replace("dynamic loss scale", f"loss scale {blocks.fp16.loss_scale:g}")
        return f"{block} block → {text} (why: docs/precision.md)" if block else text

    def _step_rows(self) -> list[tuple[str, str]]:
        """How an update is computed, where that is not the plain way."""
        step, parts = self.config.recipe.step, []
        if step.compile:
            parts.append("compiled, which takes minutes before the first update and the first evaluation")
        if self.batch.world_size > 1 and not self.averages_gradients:
            parts.append("gradients averaged by DeepSpeed, after the backward pass")
        return [("step", " · ".join(parts))] if parts else []

    def _locality_line(self) -> str:
        """What the reader of a run must know of an order that is not the paper's."""
        when = "in epoch 1 " if isinstance(self.order, WindowThenUniform) else ""
        text = f"{when}no uniform permutation: images of one update come from few shards at a time (recipe.order)"
        if self.residence is None or self.shards is None or self.shards["bytes"] is None:
            return text
        least = min(self.residence.total, self.shards["bytes"])
        return f"{text} · cache: {filesize.decimal(least)} at once if one host has all ranks"

    def _transfer_rows(self) -> list[tuple[str, str]]:
        """What a run starts from, where it is not the recipe's initialisation, and what of it is trained how."""
        section, rows = self.config.recipe.model, []
        if section.body_lr != 1:
            rows.append(("", f"× {section.body_lr:g} for everything but the classifier"))
        if section.start_from is not None:
            head = "a new classifier" if section.new_head else "a new classifier where its shape is another"
            source = f"timm's weights of {section.name}" if section.start_from == "timm" else section.start_from
            rows.append(("start", f"{source} · {head}"))
        if section.freeze:
            rows.append(("frozen", f"{', '.join(section.freeze)} · BN layers among them normalise as in evaluation"))
        return rows

    def _evaluation_rows(self) -> list[tuple[str, str]]:
        """What is measured, where it is not the weights with their running statistics alone."""
        rows, updates = [], self.precise_updates
        ema = self.config.recipe.model.ema
        if ema is not None:
            decay = f"decay {ema.decay:g} per update"
            if ema.warmup:
                decay += ", less at first"
            else:
                decay += f", {ema.decay**self.steps:.1%} of the first weights left at the end"
            beside = "beside the weights, exported as model_ema.safetensors" if ema.evaluate == "beside" else "alone"
            rows.append(("average", f"of all weights, {decay} · evaluated {beside} · not in the paper's recipe"))
        if not updates:
            return rows
        which = "the last update" if updates == 1 else f"the last {updates:,} updates"
        images = f"{updates * self.batch.train:,} training images of {which}"
        return [*rows, ("evaluation", f"BN's statistics recomputed before it over the {images}, and kept")]

    def _augmentation_rows(self) -> list[tuple[str, str]]:
        """What is done to images beyond the paper's crop and flip."""
        recipe = self.config.recipe
        transform, parts = recipe.transform, []
        if transform.auto_augment is not None:
            section = transform.auto_augment
            strength = f" {section.operations} × {section.magnitude}" if section.kind == "rand" else ""
            parts.append(f"{section.kind.capitalize()}Augment{strength}")
        if transform.color_jitter is not None:
            parts.append("colour jitter")
        if transform.random_erasing is not None:
            parts.append(f"erasing in {transform.random_erasing.probability:.0%} of images")
        if recipe.mixing is not None:
            alphas = (("mixup", recipe.mixing.mixup_alpha), ("CutMix", recipe.mixing.cutmix_alpha))
            parts += [f"{name} α = {alpha:g}" for name, alpha in alphas if alpha]
        rows = [("augment", f"{' · '.join(parts)} · not in the paper's recipe")] if parts else []
        if transform.progressive:
            steps = " → ".join(f"{part.size} from epoch {part.from_epoch:g}" for part in transform.progressive)
            rows.append(("size", f"{steps} · evaluation {transform.size}"))
        return rows

    def _data_line(self) -> str:
        if self.shards is None or self.digest is None:
            return f"{self.config.recipe.data} was not read: sizes are as given, the order is that of local shards"
        recipe = self.config.recipe
        size = self.shards["bytes"]
        return (
            f"{mask(recipe.data)}: {self.shards['train']:,} shards, "
            f"{f'{filesize.decimal(size)}, ' if size is not None else ''}index {self.digest[:4]}…{self.digest[-2:]} · "
            f"decode: {self._decode_text()} · {recipe.evaluation.split} on {self.val_samples:,} exactly"
        )

    def _decode_text(self) -> str:
        assert self.rungs is not None and self.shards is not None
        live = self.rungs[0]
        text = rungs.describe(live)
        if self.config.recipe.loader.decoder == "auto" and live != rungs.RUNGS[0]:
            text += " (why no faster one: onehour doctor)"
        if live != "native" or self.crop_indexes is None:
            return text
        if not self.crop_indexes:
            return f"{text} · no crop index: shards index {self.config.recipe.data} --decode"
        everywhere = self.crop_indexes == self.shards["train"]
        return f"{text} · crop index" + f" for {self.crop_indexes:,} shards" * (not everywhere)


def resolve(
    config: Config,
    world_size: int,
    *,
    train: AnySplit | None = None,
    validation: AnySplit | None = None,
    samples: int | None = None,
) -> Plan:
    """Bring a configuration, a world size and a data set together.

    Args:
        config: the validated file.
        world_size: number of ranks.
        train, validation: the opened splits; without them `samples` is N.
        samples: N when no data set is at hand (`onehour plan --samples`).

    Raises:
        UserError: the batch sizes do not divide over the ranks, or the decoder that is asked for is not there.
    """
    batch = batch_sizes.resolve(config, world_size)
    if config.recipe.mixing is not None and batch.micro % 2:
        raise UserError(
            f"{config.path}: recipe.mixing pairs the images of a micro-batch, and {batch.micro} is odd",
            "Choose an even train_micro_batch_size_per_gpu.",
        )
    if samples is None:
        assert train is not None, "a plan needs a training split or a number of samples"
        samples = len(train)
    if config.recipe.evaluation.precise_bn > samples:
        raise UserError(
            f"{config.path}: recipe.evaluation.precise_bn {config.recipe.evaluation.precise_bn:,} is more than the "
            f"{samples:,} training images"
        )
    schedule = Schedule.build(
        config.blocks.scheduler.params,
        lr=config.lr,
        reference_batch=config.recipe.reference_batch,
        train_batch_size=batch.train,
        samples_per_epoch=samples,
        epochs=config.recipe.epochs,
        scaling=config.recipe.scaling,
    )
    if train is None or validation is None:
        return Plan(config, batch, schedule, Order(samples, config.recipe.seed), samples)
    order = dataset.choose_order(config, batch, train, validation)
    ladder = rungs.ladder(config.recipe.loader.decoder)
    crop_indexes = None
    if ladder[0] == "native":
        dataset.crop_indexes(validation)  # the first evaluation must not be what finds a damaged one
        crop_indexes = dataset.crop_indexes(train)
    sizes = dataset.shard_bytes(train), dataset.shard_bytes(validation)
    return Plan(
        config,
        batch,
        schedule,
        order,
        samples,
        val_samples=len(validation),
        shards={
            "train": len(dataset.shard_samples(train)),
            "val": len(dataset.shard_samples(validation)),
            "bytes": sum(size for size in sizes if size is not None) if None not in sizes else None,
        },
        residence=dataset.residence(config.recipe, order, train, validation, range(batch.logical_workers), world_size)
        if isinstance(train, RemoteSplit) and isinstance(validation, RemoteSplit)
        else None,
        digest=train.digest,
        rungs=ladder,
        crop_indexes=crop_indexes,
    )


def _epochs(epochs: list[Fraction]) -> str:
    return " / ".join(f"{float(epoch):g}" for epoch in epochs)


def format_page(rows: list[tuple[str, str]]) -> str:
    """The page as plain text, for logs, records and pipes."""
    width = max(len(label) for label, _ in rows[1:]) + 2
    (name, headline), *rest = rows
    lines = [f"{name}   {headline}", ""]
    return "\n".join(lines + [f"{label:<{width}}{text}" for label, text in rest])
