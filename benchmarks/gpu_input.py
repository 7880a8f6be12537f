"""The loader of gpu.py, alone and before the engine: ordinary shards with a crop index, from the page cache.

The shards are made once, by `shards prepare imagefolder` and `shards index --decode`. The set is small and read again
and again, so that no disk is measured.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gpu_points import Say, Settings
from loader_data import INDEXED, SPLIT, Data, SkipError, collect, remove
from PIL import Image

from shards.pool import usable_cores

SYNTHETIC = 256
"""Different images, where none are given."""

USUAL_SIDES, USUAL_BYTES = (500, 375), 110_000
"""Pixels, and bytes on average, of ImageNet's images (docs/loader.md)."""

QUALITIES = range(50, 96)
TURNS = 2
CATCHING_UP = 4
"""Updates, beyond those whose batches are loaded ahead, before the engine's rate on the loader's batches is taken."""


# ---------------------------------------------------------------- data


def photograph(number: int, sides: tuple[int, int]) -> Image.Image:
    """Noise whose octaves grow with their wavelength, as in photographs."""
    generator = np.random.default_rng([0, number])
    width, height = sides
    pixels = np.full((height, width, 3), 128, np.float32)
    wavelength = 1
    while wavelength < min(sides):
        shape = (height // wavelength + 1, width // wavelength + 1, 3)
        octave = generator.normal(128, 24, shape).clip(0, 255).astype(np.uint8)
        resized = Image.fromarray(octave).resize(sides, Image.Resampling.BICUBIC)
        pixels += (np.asarray(resized, np.float32) - 128) * min(1.0, wavelength / 4)
        wavelength *= 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, quality: int) -> bytes:
    """A JPEG with the usual subsampling."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_synthetic(target: Path, images: int, sides: tuple[int, int]) -> None:
    """A class folder of JPEGs of ImageNet's usual size in pixels and, as near as quality allows, in bytes."""
    wanted = USUAL_BYTES * sides[0] * sides[1] / (USUAL_SIDES[0] * USUAL_SIDES[1])
    first = photograph(0, sides)
    quality = min(QUALITIES, key=lambda quality: abs(len(encoded(first, quality)) - wanted))
    for number in range(images):
        path = target / f"class-{number % 8}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photograph(number, sides), quality))


def collected(settings: Settings) -> Data:
    """The images as a class folder, made where they are not there yet."""
    work = settings.folder / "data"
    if settings.images is not None:
        return collect(Path(settings.images), work, settings.dataset)
    sides = (settings.size * 2, settings.size * 3 // 2) if settings.smoke else USUAL_SIDES
    different = min(SYNTHETIC, settings.dataset)
    source = work / f"synthetic-{different}-{sides[0]}x{sides[1]}"
    if not source.exists():
        partial = source.with_name(f"partial-{source.name}")
        remove(partial)
        write_synthetic(partial, different, sides)
        partial.rename(source)
    return collect(source, work, settings.dataset)


def shards_of(data: Data) -> Path:
    """The shards with a crop index, or without one where there is none."""
    indexed = data.root / INDEXED
    return indexed if indexed.exists() else data.shards


def data(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """Make the shards and their crop index; what cannot have one is read without."""
    began = time.perf_counter()
    made = collected(settings)
    why = None
    try:
        made.make_shards()
        _ = made.indexed_shards
    except SkipError as error:
        why = str(error)
        remove(made.root / INDEXED)
    sizes = [path.stat().st_size for path in made.images()]
    say(
        images=len(sizes),
        mean_bytes=statistics.fmean(sizes),
        source=settings.images or "synthetic JPEGs of ImageNet's size",
        crop_index=why is None,
        why=why,
        seconds=time.perf_counter() - began,
    )


# ---------------------------------------------------------------- measuring


class Waiting:
    """An iterator that measures how long its consumer waits."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Waiting:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        batch = next(self._batches)
        self.seconds += time.perf_counter() - began
        return batch


def thread_counts() -> list[int]:
    """Those to compare: up to all cores but one, which the training's own thread may need."""
    most = max(1, usable_cores() - 1)
    return sorted({count for count in (4, 8, 12, most) if count <= most})


def end_to_end(settings: Settings, say: Say, what: dict[str, Any]) -> None:
    """The loader alone, then the engine on its batches and on batches that are on the device, in turns."""
    from gpu_contenders import allow_tf32, forget, make_engine, ours, resident, synchronise
    from gpu_steps import timed, updates_of

    from pipeline.decode import make_decoder
    from pipeline.engine import Engine
    from pipeline.loader import Loader, default_threads, training_requests
    from pipeline.order import Order
    from pipeline.reader import ShardReader
    from shards.index import load_split

    split = load_split(shards_of(collected(settings)), SPLIT)
    threads = default_threads(1)

    def loader(trained: Engine, threads: int) -> Loader:
        """As a run makes it."""
        plan = trained.plan
        recipe = plan.config.recipe
        requests = training_requests(
            Order(len(split), recipe.seed), plan.batch, recipe.transform, 0, 0, updates=sys.maxsize
        )
        decoder = make_decoder(recipe.transform, recipe.seed, recipe.loader.decoder)
        return Loader(
            ShardReader(split),
            decoder,
            requests,
            threads=threads,
            prefetch=recipe.loader.prefetch,
            copied_on=trained.copied_on,
        )

    for number, point in enumerate(settings.fed):
        trained = make_engine(point, settings)
        allow_tf32(False)
        prefetch = trained.plan.config.recipe.loader.prefetch
        if number == 0:
            for count in thread_counts():
                with loader(trained, count) as batches:
                    rates = [_rate(batches, settings, prefetch) for _ in range(TURNS)]
                    tally = batches.take_tally()
                say(what="loader alone", threads=count, rates=rates, images=point.images, decoded=tally.figures())
        with loader(trained, threads) as batches:
            waiting = Waiting(batches)
            on_device = ours(trained, resident(point.images, settings.size))
            fed = ours(trained, waiting)
            timed(on_device, settings.warm_up)
            of_resident = updates_of(on_device, settings.loaded_seconds / 5)
            rates, loaded, waited = [], [], []
            for _ in range(TURNS):
                rates.append(of_resident * point.images / timed(on_device, of_resident))
                timed(fed, prefetch + CATCHING_UP)  # else what was loaded meanwhile would count
                synchronise()
                began, updates, waiting.seconds = time.perf_counter(), 0, 0.0
                while time.perf_counter() - began < settings.loaded_seconds:
                    fed.update()
                    updates += 1
                synchronise()
                seconds = time.perf_counter() - began
                loaded.append(updates * point.images / seconds)
                waited.append(waiting.seconds / seconds)
            rates.append(of_resident * point.images / timed(on_device, of_resident))
        say(what="engine", point=vars(point), threads=threads, resident=rates, loaded=loaded, waited=waited)
        del trained, on_device, fed
        forget()


def _rate(batches: Iterator[Any], settings: Settings, prefetch: int) -> float:
    """Images per second of a loader whose batches are dropped, after those that are loaded ahead."""
    for _ in range(prefetch + 1):
        next(batches)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < settings.loaded_seconds / 10:
        images += len(next(batches).ids)
    return images / (time.perf_counter() - began)
