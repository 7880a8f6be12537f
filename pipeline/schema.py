"""What is ours in a configuration file: the `recipe` section, and the schedule's parameters.

The file is a DeepSpeed config plus one section of ours, `recipe`; DeepSpeed's part is in `deepspeed_schema`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.augment_schema import AutoAugment, ColorJitter, Mixing, RandomErasing, Resolution
from pipeline.options_schema import Ema, Loss
from pipeline.section import Section, check_rectangles, lists_to_tuples

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DecoderChoice = Literal["auto", "native", "simplejpeg", "pillow"]
"""What `recipe.loader.decoder` may say; see `pipeline.rungs`."""

REFUSED_MODEL_ARGS = {
    "pretrained": "weights to start from are recipe.model.start_from",
    "checkpoint_path": "weights to start from are recipe.model.start_from",
    "in_chans": "images are decoded to RGB, three channels",
}
"""Arguments of timm.create_model that the rest of the trainer does not follow, and why."""

LONGEST_SIDE = 32_767
"""Pixels that an image may be scaled to."""

DECAY_OWN_KEYS = {
    "milestones": ("steps",),
    "gamma": ("steps",),
    "final_lr": ("cosine", "linear", "polynomial"),
    "power": ("polynomial",),
}
"""Keys of `scheduler.params` that some ways of decay alone read."""

CROP_OWN_KEYS = {"padding": "padded", "scale": "resized", "ratio": "resized"}
"""Keys of `recipe.transform` that one way of cropping alone reads."""


class ScheduleParams(Section):
    """`scheduler.params` of `GradualWarmupLR`; everything is counted in epochs (paper §2.2 and §5.1)."""

    warmup: Literal["gradual", "constant", "none"] = "gradual"
    warmup_epochs: float = Field(5, ge=0)
    warmup_lr: float | None = Field(None, ge=0, description="where warmup begins; default: lr, as in the paper")
    decay: Literal["steps", "cosine", "linear", "polynomial", "constant"] = Field(
        "steps", description="from the end of warmup to the end of the run"
    )
    milestones: list[float] = Field(default_factory=list, description="steps only")
    gamma: float = Field(0.1, gt=0, description="at each milestone; steps only")
    final_lr: float = Field(0, ge=0, description="at the end of the run; cosine, linear and polynomial only")
    power: float = Field(2, gt=0, description="polynomial only")

    @model_validator(mode="after")
    def _own_keys(self) -> ScheduleParams:
        for key, decays in DECAY_OWN_KEYS.items():
            if self.decay not in decays and key in self.model_fields_set and getattr(self, key) != self._default(key):
                raise ValueError(
                    f'{key} is for decay "{decays[0]}" and has no effect with decay "{self.decay}": leave it out'
                )
        return self

    @classmethod
    def _default(cls, key: str) -> Any:
        return cls.model_fields[key].get_default(call_default_factory=True)

    @model_validator(mode="after")
    def _ascending(self) -> ScheduleParams:
        if any(later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError("milestones must ascend")
        if self.milestones and self.milestones[0] <= 0:
            raise ValueError("milestones are epochs after the start: they must be positive")
        return self


class Model(Section):
    """A timm model by name. Residual networks get the paper's initialisation (§5.1), others keep their own."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of timm.create_model")
    zero_init_last: bool = Field(True, description="γ = 0 in each residual block's last BN (ResNets only)")
    start_from: str | None = Field(
        None, min_length=1, description='weights to begin with: a file that timm reads, or "timm" for its own'
    )
    new_head: bool = Field(False, description="a new classifier, even where the one of start_from has the right shape")
    freeze: list[str] = Field(default_factory=list, description='parameters that are not trained: ["layer1.*"]')
    body_lr: float = Field(1, gt=0, description="factor of the rate, for everything but the classifier")
    ema: Ema | None = None

    @model_validator(mode="after")
    def _head_of_something(self) -> Model:
        if self.new_head and self.start_from is None:
            raise ValueError("new_head is for start_from: without it the classifier is new anyway")
        return self

    @field_validator("args")
    @classmethod
    def _trainable_here(cls, args: dict[str, Any]) -> dict[str, Any]:
        for key, reason in REFUSED_MODEL_ARGS.items():
            if key in args:
                raise ValueError(f"{key} is not used here: {reason}")
        classes = args.get("num_classes", 1)
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            raise ValueError(f"num_classes must be a number of classes, not {json.dumps(classes)}")
        return args


class Transform(Section):
    """How an image becomes `size` × `size` pixels, in training and in evaluation."""

    size: int = Field(224, gt=0)
    crop: Literal["resized", "padded", "none"] = "resized"
    scale: tuple[float, float] = Field((0.08, 1.0), description="share of the image's area; crop = resized only")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width / height; crop = resized only")
    padding: int = Field(4, ge=0, description="pixels on each side; crop = padded only")
    flip: bool = True
    evaluation_resize: int = Field(256, gt=0, description="short side before the centre crop of `size`")
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    progressive: tuple[Resolution, ...] = Field((), description="training sizes by epoch; evaluation keeps `size`")
    color_jitter: ColorJitter | None = None
    auto_augment: AutoAugment | None = None
    random_erasing: RandomErasing | None = None

    _tuples = model_validator(mode="before")(lists_to_tuples)

    def training_size(self, epoch: float) -> int:
        """Pixels of an update that begins in `epoch`, counted from 0 with its fraction."""
        begun = [resolution.size for resolution in self.progressive if resolution.from_epoch <= epoch]
        return begun[-1] if begun else self.size

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that the model meets, ascending."""
        return tuple(sorted({self.size, *(resolution.size for resolution in self.progressive)}))

    @property
    def changes_images(self) -> bool:
        """Whether training images are changed after their view has been cut out."""
        return any(section is not None for section in (self.color_jitter, self.auto_augment, self.random_erasing))

    @model_validator(mode="after")
    def _ordered(self) -> Transform:
        check_rectangles(self.scale, self.ratio)
        if self.sizes[-1] > LONGEST_SIDE:
            raise ValueError(f"a size of {self.sizes[-1]} is more than {LONGEST_SIDE:,} pixels")
        if self.evaluation_resize < self.size:
            raise ValueError(f"evaluation_resize {self.evaluation_resize} is smaller than size {self.size}")
        if self.evaluation_resize > LONGEST_SIDE:
            raise ValueError(f"evaluation_resize {self.evaluation_resize} is more than {LONGEST_SIDE:,} pixels")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        self._check_progressive()
        for key, crop in CROP_OWN_KEYS.items():
            # at its default it says nothing: a resolved configuration has every default written out
            if self.crop != crop and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'{key} is for crop "{crop}" and has no effect with crop "{self.crop}": leave it out')
        return self

    def _check_progressive(self) -> None:
        epochs = [resolution.from_epoch for resolution in self.progressive]
        if epochs and epochs[0] != 0:
            raise ValueError("progressive must begin with from_epoch 0")
        if any(later <= earlier for earlier, later in pairwise(epochs)):
            raise ValueError("progressive: from_epoch must ascend")
        if self.progressive and self.crop == "padded":
            raise ValueError('progressive changes the size of crops: it is not for crop "padded"')


class Evaluation(Section):
    """When and how the whole validation split is measured."""

    split: str = "val"
    every_epochs: int = Field(1, ge=1)
    micro_batch_size: int | None = Field(None, gt=0, description="default: the images of a training pass")
    precise_bn: int = Field(
        0, ge=0, description="training images that BN's statistics are recomputed over before; 0: running statistics"
    )


class Checkpoints(Section):
    """When the run is saved, and how many saves are kept."""

    every_epochs: float = Field(1, gt=0, description="may be a part of an epoch")
    keep: int = Field(3, ge=1)
    background: bool = Field(True, description="written beside the training, which waits only while memory is copied")


class Loader(Section):
    """Reading and decoding, per rank. None of it changes the order or a view; decoders differ by rounding."""

    threads: int | None = Field(None, ge=1, description="default: this rank's share of the cores")
    prefetch: int = Field(4, ge=1, description="passes (micro-batches, or several at once) decoded ahead")
    decoder: DecoderChoice = Field(
        "auto", description="the best that is there, or by name; what it refuses goes to the ones below it"
    )


class SampleOrder(Section):
    """Which images can meet in one update. Every kind uses every image exactly once per epoch, on any number of ranks.

    uniform: any of them, the paper's sampling (§2.3, remark 4); window: those of `window_shards` shards per stream,
    for shards that come by network or lie on slow disks; stream: those of `shuffle_buffer` images per stream, for
    shards that can only be read from end to end. auto: uniform where the shards are local; window where they are
    remote, and only in the first epoch if they all fit into the cache; stream where `recipe.stream` is given.
    """

    kind: Literal["auto", "uniform", "window", "stream"] = "auto"
    window_shards: int = Field(16, ge=1, description="shards in a window of a stream; window only")
    shuffle_buffer: int = Field(256, ge=1, description="images per stream, held in memory twice; stream only")
    streams: int | None = Field(
        None, ge=1, description="a divisor of k; each host fetches its own (default: the largest up to 8; stream: 64)"
    )


class Cache(Section):
    """Where remote shards are kept on each host."""

    folder: str | None = Field(None, description="default: onehour/shards in the user's cache folder")
    gigabytes: float = Field(200, gt=0, description="most that it may hold, in units of 10⁹ bytes")


class Logging(Section):
    """What the run writes down."""

    every_steps: int = Field(20, ge=1)
    record_samples: bool = Field(False, description="write every consumed sample id and the LR used, per rank")


class Step(Section):
    """How a rank computes an update. None of it changes what is learned, but by rounding."""

    compile: bool = Field(False, description="torch.compile the model; the first updates and evaluation take minutes")
    ghost_batches: int | Literal["auto"] = Field(
        "auto",
        description="most logical workers of a rank that go through the model at once, each normalised by itself; "
        "auto: 1, or what makes 256 images if the model is compiled",
    )
    overlap: bool = Field(True, description="average gradients over the ranks while others are still computed")
    tf32: bool = Field(
        False, description="float32 convolutions and matrix products with ten bits of mantissa, on GPUs that have it"
    )

    @field_validator("ghost_batches")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value


class Watchdog(Section):
    """When a training that cannot go on is ended on all hosts, with the stacks of every rank; 0 is never."""

    silent_seconds: float = Field(30, ge=0, description="without a sign of life from a rank")
    stuck_seconds: float = Field(600, ge=0, description="in which no rank gets any further, whatever it waits for")
    withheld_updates: int = Field(
        50, ge=0, description="float16 updates in a row that overflowed, after which the run is stopped; 0 is never"
    )


class Recipe(Section):
    """Everything that DeepSpeed has no key for."""

    data: str = Field(
        description="folder of shards: a path, or a URL that fsspec opens (https://, s3://, gs://, hf://)"
    )
    model: Model
    epochs: float = Field(gt=0)
    reference_batch: int = Field(256, gt=0, description="the batch that optimizer.params.lr is for (paper §2.1)")
    scaling: Literal["linear", "square_root", "none"] = Field(
        "linear", description="how the rate follows train_batch_size; square_root is usual for Adam and its kin"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    run: str | None = Field(None, description="run folder; default runs/<name of the config>")
    transform: Transform = Transform()
    mixing: Mixing | None = None
    loss: Loss = Loss()
    order: SampleOrder = SampleOrder()
    cache: Cache = Cache()
    stream: str | None = Field(
        None,
        description="read shards from end to end: a URL or pipe: command, {} for the name, that webdataset opens",
    )
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    loader: Loader = Loader()
    step: Step = Step()
    logging: Logging = Logging()
    watchdog: Watchdog = Watchdog()

    @model_validator(mode="after")
    def _sizes_are_reached(self) -> Recipe:
        late = [size.from_epoch for size in self.transform.progressive if size.from_epoch >= self.epochs]
        if late:
            raise ValueError(
                f"transform.progressive: from_epoch {late[0]:g} is never reached: the run ends at epoch {self.epochs:g}"
            )
        return self

    @model_validator(mode="after")
    def _one_smoothing(self) -> Recipe:
        if self.mixing is not None and self.loss.label_smoothing:
            raise ValueError(
                "loss.label_smoothing is for images that are not mixed: with mixing, write mixing.label_smoothing"
            )
        return self

    @model_validator(mode="after")
    def _stream_pattern(self) -> Recipe:
        if self.stream is not None and "{}" not in self.stream:
            raise ValueError(
                'stream needs {} where the shard\'s name goes, e.g. "pipe:aws s3 cp s3://bucket/imagenet/{} -"'
            )
        if (self.order.kind == "stream") and self.stream is None:
            raise ValueError('order.kind "stream" needs recipe.stream: the URL or command that gives a shard')
        if self.stream is not None and self.order.kind in ("uniform", "window"):
            raise ValueError(
                f'order.kind "{self.order.kind}" needs random access, which recipe.stream has not: leave one out'
            )
        return self
