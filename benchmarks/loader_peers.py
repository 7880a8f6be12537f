"""Other projects' loaders, each set up as its documentation says, for the same images and the same transform.

A row is a function of (data, workers, batch) that yields batches without end: RandomResizedCrop of 0.08 to 1 of the
area to 224 × 224, bilinear with antialiasing where the loader has it, and a horizontal flip. What its batches are
(uint8 or normalised float32, which memory order) is the loader's own way, and the table says it. Imports are inside of
the functions: a project that is not installed is skipped, and the others' processes stay free of it.

webdataset, DALI and spdl stream without end; the others start anew after each epoch, and torch's DataLoader keeps its
workers. loader.py says how many epochs end while it measures: one with its defaults, none with --light.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from loader_data import SPLIT, Data, SkipError

SIZE = 224
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def forever(batches: Iterable[Any]) -> Iterator[Any]:
    """The images of (images, labels), epoch after epoch."""
    while True:
        for batch in batches:
            yield batch[0]


def pillow_transform() -> Callable[[Any], Any]:
    """torchvision's reference transform on Pillow images; converts to RGB."""
    from torchvision import transforms

    steps = [
        to_rgb,
        transforms.RandomResizedCrop(SIZE, AREA, RATIO),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return transforms.Compose(steps)


def to_rgb(image: Any) -> Any:
    """Grayscale too becomes three channels."""
    return image.convert("RGB")


def torchvision_v2(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """ImageFolder, decode_image, transforms v2 on uint8 tensors."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    steps = [
        v2.RandomResizedCrop(SIZE, AREA, RATIO, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    folder = ImageFolder(
        str(data.folder), v2.Compose(steps), loader=lambda path: decode_image(path, mode=ImageReadMode.RGB)
    )
    return forever(torch_loader(folder, workers, batch, shuffle=True))


def torch_loader(dataset: Any, workers: int, batch: int, **options: Any) -> Any:
    """torch's DataLoader, whose workers live through all epochs."""
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch, num_workers=workers, persistent_workers=True, drop_last=True, **options)


def timm_loader(dataset: Any, workers: int, batch: int) -> Iterator[Any]:
    """timm's create_loader, up to its prefetcher, which would normalise on the device."""
    import torch
    from timm.data import create_loader

    loader = create_loader(
        dataset,
        (3, SIZE, SIZE),
        batch,
        is_training=True,
        scale=AREA,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=0.0,
        auto_augment=None,
        re_prob=0.0,
        interpolation="bilinear",
        num_workers=workers,
        persistent_workers=True,
        use_prefetcher=True,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    return forever(loader.loader)


def timm_wds(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """create_dataset("wds/…") and create_loader, on our tars; starts anew after each epoch.

    Its workers then fill their shuffle buffers from the first shard on. With the defaults of loader.py (2,048 images in
    the data set, 2,560 measured after 512 to warm up) that happens once while it is measured, and reading for the next
    epoch counts; ReaderWds has no way to go on without it: it takes `repeats` and does not use it.
    """
    from timm.data import create_dataset

    dataset = create_dataset("wds/imagenet", root=str(data.shards), split=SPLIT, is_training=True, batch_size=batch)
    return timm_loader(dataset, workers, batch)


def timm_folder(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """create_dataset of a folder and create_loader."""
    from timm.data import create_dataset

    return timm_loader(create_dataset("", root=str(data.folder), split="", is_training=True), workers, batch)


def webdataset(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """The pipeline of webdataset's README, and WebLoader."""
    import webdataset as wds

    transform = pillow_transform()
    dataset = (
        wds.WebDataset([str(tar) for tar in data.tars], resampled=True, shardshuffle=True)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, lambda label: label)
        .batched(batch)
    )
    return forever(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def dali(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """readers.webdataset, decoders.image_random_crop; CPU only, threads."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=None)
    def pipeline() -> tuple[Any, ...]:
        encoded, label = fn.readers.webdataset(
            paths=[str(tar) for tar in data.tars],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=256,
            missing_component_behavior="error",
        )
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_aspect_ratio=list(RATIO), random_area=list(AREA)
        )
        images = fn.resize(images, size=(SIZE, SIZE))
        return fn.flip(images, horizontal=fn.random.coin_flip()), label

    running = pipeline()
    running.build()
    while True:
        images, _ = running.run()
        yield np.asarray(images.as_tensor())


def ffcv(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """Its own file: JPEGs encoded anew with quality 90, so fewer bytes."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    pipelines = {
        "image": [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }
    loader = Loader(
        str(data.form("train.beton", lambda target: write_beton(data, target))),
        batch_size=batch,
        num_workers=workers,
        order=OrderOption.QUASI_RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines=pipelines,
    )
    return forever(loader)


def write_beton(data: Data, target: Path) -> None:
    """FFCV's file; it cannot hold the original bytes."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    image = RGBImageField(write_mode="jpg", max_resolution=None, jpeg_quality=90)
    writer = DatasetWriter(str(target), {"image": image, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(ImageFolder(str(data.folder)))


def mosaicml(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """StreamingDataset of MDS shards with the original bytes, Pillow."""
    from PIL import Image
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    transform = pillow_transform()

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            sample = super().__getitem__(index)
            return transform(Image.open(io.BytesIO(sample["image"]))), sample["label"]

    folder = data.form("mds", lambda target: write_mds(data, target))
    clean_stale_shared_memory()
    dataset = Images(local=str(folder), remote=None, shuffle=True, batch_size=batch)
    return forever(torch_loader(dataset, workers, batch))


def write_mds(data: Data, target: Path) -> None:
    """MosaicML Streaming's shards, the bytes untouched."""
    from streaming import MDSWriter

    with MDSWriter(out=str(target), columns={"image": "bytes", "label": "int"}, size_limit=1 << 25) as writer:
        for label, path in labelled(data):
            writer.write({"image": path.read_bytes(), "label": label})


def litdata(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """StreamingDataset of chunks with the original bytes, Pillow."""
    from litdata import StreamingDataLoader, StreamingDataset

    folder = data.form("litdata", lambda target: write_litdata(data, target))
    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=LitdataTransform())
    return forever(StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True))


class LitdataTransform:
    """Bytes and label → pixels and label; a class, since litdata's workers are spawned and get it pickled."""

    def __init__(self) -> None:
        self._transform = pillow_transform()

    def __call__(self, sample: tuple[bytes, int], *_: Any) -> tuple[Any, int]:
        from PIL import Image

        return self._transform(Image.open(io.BytesIO(sample[0]))), sample[1]


def write_litdata(data: Data, target: Path) -> None:
    """litdata's chunks, the bytes untouched."""
    from litdata import optimize

    optimize(
        fn=read_labelled,
        inputs=labelled(data),
        output_dir=str(target),
        chunk_bytes="32MB",
        num_workers=1,
        verbose=False,
    )


def read_labelled(labelled_path: tuple[int, Path]) -> tuple[bytes, int]:
    """In litdata's worker, which imports this module."""
    label, path = labelled_path
    return path.read_bytes(), label


def spdl(data: Data, workers: int, batch: int) -> Iterator[Any]:
    """Threads; decode, crop and resize (no antialiasing) by FFmpeg."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    images = data.images()
    draw = random.Random(0)
    try:
        spdl.io.demux_image(images[0].read_bytes())
    except RuntimeError as error:
        if "libspdl" not in str(error):
            raise
        raise SkipError("spdl finds no FFmpeg libraries (Debian's package ffmpeg brings them)") from None

    def source() -> Iterator[Path]:
        while True:
            yield from draw.sample(images, len(images))

    def decode(path: Path) -> Any:
        packets = spdl.io.demux_image(path.read_bytes())
        codec = getattr(packets, "codec", None) or packets
        left, top, width, height = random_box(codec.width, codec.height, draw)
        flip = "hflip," if draw.random() < 0.5 else ""
        filters = f"crop={width}:{height}:{left}:{top},scale={SIZE}:{SIZE}:flags=bilinear,{flip}format=pix_fmts=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=filters)

    def collate(frames: list[Any]) -> Any:
        return spdl.io.to_torch(spdl.io.convert_frames(frames))

    builder = PipelineBuilder().add_source(source()).pipe(decode, concurrency=workers).aggregate(batch)
    pipeline = builder.pipe(collate).add_sink(3).build(num_threads=workers)
    with pipeline.auto_stop():
        yield from pipeline.get_iterator(timeout=60)


def random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """RandomResizedCrop's left, top, width, height, for a loader that has none."""
    for _ in range(10):
        area = width * height * draw.uniform(*AREA)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return draw.randint(0, width - across), draw.randint(0, height - down), across, down
    return 0, 0, width, height


def labelled(data: Data) -> list[tuple[int, Path]]:
    """(label, file) of all images."""
    images = data.images()
    labels = {name: label for label, name in enumerate(sorted({path.parent.name for path in images}))}
    return [(labels[path.parent.name], path) for path in images]
