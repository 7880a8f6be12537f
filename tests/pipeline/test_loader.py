"""Batches are a function of the requests alone: not of threads, ranks, timing or rung; errors name the sample."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import reader as readers
from pipeline import rungs, slabs
from pipeline.batch import Batch
from pipeline.decode import AugmentError, Decoder, make_decoder
from pipeline.loader import LARGEST_SLICE, Loader, Request, evaluation_requests, slices, training_requests
from pipeline.order import Order
from pipeline.reader import NOT_OPEN, Encoded, Located, ShardReader
from pipeline.rungs import RUNGS
from pipeline.schema import Transform
from pipeline.slabs import SlabRing
from shards.cli import main as shards_main
from shards.errors import UserError
from shards.index import load_split
from tests.conftest import require_rung

TRANSFORM = Transform(size=24, evaluation_resize=28)


@pytest.fixture
def reader(tiny_shards):
    reader = ShardReader(load_split(tiny_shards, "train"))
    yield reader
    reader.close()


@pytest.fixture(params=RUNGS)
def rung(request: pytest.FixtureRequest) -> str:
    """Each rung that is there."""
    return require_rung(request.param)


def request_of(*ids: int, epoch: int | None = 0) -> Request:
    epochs = None if epoch is None else np.full(len(ids), epoch, dtype=np.int64)
    return Request(
        np.array(ids, dtype=np.int64), epochs, np.ones(len(ids), np.float32), min(ids), max(ids), TRANSFORM.size
    )


def epoch_pixels(
    reader: ShardReader,
    rung: str,
    *,
    world_size: int,
    threads: int,
    prefetch: int,
    transform: Transform = TRANSFORM,
) -> dict[int, bytes]:
    """The bytes of every sample of two epochs, by position in the stream."""
    order = Order(len(reader.split), seed=5)
    batch = Batch(train=16, micro=4, accumulation=4 // world_size, world_size=world_size)
    pixels: dict[int, bytes] = {}
    for rank in range(world_size):
        requests = training_requests(order, batch, transform, rank, 0, 16)
        with Loader(reader, make_decoder(transform, 5, rung), requests, threads=threads, prefetch=prefetch) as loader:
            for index, micro_batch in enumerate(loader):
                update, micro_step = divmod(index, batch.accumulation)
                start = update * 16 + (rank * batch.accumulation + micro_step) * 4
                for offset in range(4):
                    pixels[start + offset] = micro_batch.images[offset].numpy().tobytes()
                    assert micro_batch.ids[offset] == order.ids(start + offset, start + offset + 1)[0]
                    assert micro_batch.labels[offset] == reader.split.samples[int(micro_batch.ids[offset])]["label"]
    return pixels


def test_pixels_are_the_same_for_any_threads_and_ranks(reader, rung):
    expected = epoch_pixels(reader, rung, world_size=1, threads=1, prefetch=1)
    assert sorted(expected) == list(range(256))
    for world_size, threads, prefetch in ((1, 8, 7), (2, 2, 1), (4, 3, 4)):
        assert epoch_pixels(reader, rung, world_size=world_size, threads=threads, prefetch=prefetch) == expected


@pytest.mark.parametrize("together", [2, 4])
def test_workers_at_once_are_one_micro_batch_of_the_same_samples(together):
    order = Order(130, seed=5)
    for world_size in (1, 2):
        in_turn = Batch(train=32, micro=4, accumulation=8 // world_size, world_size=world_size)
        at_once = replace(in_turn, together=together)
        for rank in range(world_size):
            single = list(training_requests(order, in_turn, TRANSFORM, rank, 2, 9))
            joined = list(training_requests(order, at_once, TRANSFORM, rank, 2, 9))
            assert len(single) == together * len(joined) and {len(request.ids) for request in joined} == {4 * together}
            for name in ("ids", "epochs", "weights"):
                parts = [np.concatenate([getattr(request, name) for request in some]) for some in (single, joined)]
                assert np.array_equal(*parts), name
            assert [request.first for request in joined] == [request.first for request in single[::together]]
            assert [request.last for request in joined] == [
                request.last for request in single[together - 1 :: together]
            ]


def test_augmented_pixels_and_sizes_are_the_same_for_any_threads_and_ranks(reader, rung):
    transform = Transform.model_validate(
        {
            **TRANSFORM.model_dump(),
            "auto_augment": {"kind": "rand"},
            "color_jitter": {"brightness": 0.4, "saturation": 0.4},
            "random_erasing": {"probability": 0.5, "fill": "noise"},
            "progressive": [{"from_epoch": 0, "size": 16}, {"from_epoch": 1, "size": 20}],
        }
    )
    expected = epoch_pixels(reader, rung, world_size=1, threads=1, prefetch=1, transform=transform)
    sizes = [len(pixels) for _, pixels in sorted(expected.items())]
    # of 130 images, the ninth update begins at position 128, still in the first epoch
    assert sizes == [16 * 16 * 3] * 144 + [20 * 20 * 3] * 112
    assert epoch_pixels(reader, rung, world_size=4, threads=8, prefetch=4, transform=transform) == expected


@pytest.fixture
def eight_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def test_augmented_pixels_are_the_same_for_any_number_of_torch_s_threads(reader, eight_threads):
    """A mean in float32 depends on how many threads add up its parts."""
    transform = Transform(size=384, evaluation_resize=384, color_jitter={"contrast": 0.9})
    requests = [replace(request_of(*range(start, start + 4)), size=384) for start in range(0, 64, 4)]
    batches = []
    for threads in (1, 8):
        torch.set_num_threads(threads)
        with Loader(reader, make_decoder(transform, 5), requests, threads=2, prefetch=2) as loader:
            batches.append(torch.cat([batch.images for batch in loader]))
        assert torch.get_num_threads() == threads, "the training's own"
    assert batches[0].equal(batches[1])


def test_the_threads_of_a_loader_leave_the_number_of_the_training_s_alone(reader, eight_threads):
    with Loader(reader, make_decoder(TRANSFORM, 5), [], threads=2, prefetch=1) as loader:
        assert loader._pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 8


@pytest.mark.parametrize("epoch", [None, 1])
def test_every_rung_loads_the_same_images_and_labels(reader, rung, epoch):
    requests = [request_of(*range(start, start + 13), epoch=epoch) for start in range(0, 130, 13)]
    batches = []
    for choice in (rung, "pillow"):
        with Loader(reader, make_decoder(TRANSFORM, 5, choice), requests, threads=2, prefetch=2) as loader:
            batches.append(list(loader))
    for ours, pillow in zip(*batches, strict=True):
        differences = (ours.images.short() - pillow.images.short()).abs()
        assert differences.max() <= 2 and differences.float().mean() < 0.5
        assert ours.labels.tolist() == pillow.labels.tolist()


def test_an_image_looks_different_in_every_epoch(reader):
    ids, weights = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.float32)
    requests = [Request(ids, np.array([epoch]), weights, epoch, epoch, TRANSFORM.size) for epoch in range(6)]
    with Loader(reader, make_decoder(TRANSFORM, 5), requests, threads=2, prefetch=2) as loader:
        views = {batch.images.numpy().tobytes() for batch in loader}
    assert len(views) == 6


@pytest.mark.parametrize(("samples", "micro"), [(35, 8), (35, 35), (35, 64), (1, 4), (8, 4), (7, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_covers_every_sample_once_in_one_shape(samples, micro, world_size):
    seen = []
    for rank in range(world_size):
        for request in evaluation_requests(samples, micro, 24, rank, world_size):
            assert request.ids.shape == request.weights.shape == (micro,)
            assert request.ids.max() < samples
            seen += request.ids[request.weights == 1].tolist()
    assert sorted(seen) == list(range(samples))


def test_images_are_channels_last_and_unnormalised(reader):
    request = Request(np.arange(4), np.zeros(4, dtype=np.int64), np.ones(4, dtype=np.float32), 0, 3, TRANSFORM.size)
    with Loader(reader, make_decoder(TRANSFORM, 5), [request], threads=1, prefetch=1) as loader:
        batch = next(loader)
    assert batch.images.shape == (4, 3, 24, 24)
    assert batch.images.permute(0, 2, 3, 1).is_contiguous()
    assert batch.images.dtype.is_floating_point is False
    assert int(batch.images.max()) > 200


def test_a_corrupt_image_is_named_when_its_batch_is_asked_for_and_the_threads_end(tiny_shards, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(tiny_shards, root)
    split = load_split(root, "train")
    bad = 50
    record = split.samples[bad]
    path = split.shards[int(record["shard"])].path
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(bytes(int(record["size"])))
    reader = ShardReader(split)
    before = threading.active_count()
    requests = [
        Request(np.arange(s, s + 4), np.zeros(4, dtype=np.int64), np.ones(4, np.float32), s, s + 3, TRANSFORM.size)
        for s in (0, 48, 8)
    ]
    loader = Loader(reader, make_decoder(TRANSFORM, 5), requests, threads=4, prefetch=8)
    next(loader)
    with pytest.raises(UserError) as error:
        next(loader)
    for _ in range(2):
        with pytest.raises(UserError) as again:
            next(loader)
        assert again.value is error.value, "and not the micro-batch after it"
    assert path.name in str(error.value) and split.key(bad) in str(error.value) and "decoded" in str(error.value)
    began = time.monotonic()
    loader.close()
    reader.close()
    assert time.monotonic() - began < 2
    assert threading.active_count() == before


@pytest.mark.parametrize("what", ["decoding", "augmenting"])
def test_an_error_of_any_kind_names_the_sample(reader, rung, what, monkeypatch):
    def fail(*arguments, **options) -> None:
        raise ZeroDivisionError("a bug")

    decoder = make_decoder(Transform(size=24, evaluation_resize=28, color_jitter={"hue": 0.1}), 5, rung)
    if what == "augmenting":
        monkeypatch.setattr(decoder._augmentation, "apply", fail)
    else:
        monkeypatch.setattr(type(decoder), "reads_files", False)
        monkeypatch.setattr(decoder._decoders[0], "train", fail)
    with (
        Loader(reader, decoder, [request_of(50)], threads=1, prefetch=1) as loader,
        pytest.raises((AugmentError, ZeroDivisionError)) as error,
    ):
        next(loader)
    assert any(reader.split.key(50) in note for note in error.value.__notes__)


def test_a_shard_that_shrank_after_the_start_is_an_error_at_the_sample(tiny_shards, tmp_path):
    root = tmp_path / "shrunk"
    shutil.copytree(tiny_shards, root)
    split = load_split(root, "train")
    path = split.shards[0].path
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(int(split.samples[3]["offset"]) + 10)
    with pytest.raises(UserError, match="ends after 10 of") as error:
        ShardReader(split).read(3)
    assert "shards verify" in str(error.value)


def test_closing_in_the_middle_of_an_epoch_is_prompt(reader):
    requests = (
        Request(np.arange(8), np.full(8, e), np.ones(8, np.float32), e, e, TRANSFORM.size) for e in range(10_000)
    )
    loader = Loader(reader, make_decoder(TRANSFORM, 5), requests, threads=4, prefetch=50)
    next(loader)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2


# ---------------------------------------------------------------- recycled memory


def endless(batch: int = 4) -> Iterator[Request]:
    for start in range(10**6):
        yield request_of(*((start * batch + offset) % 130 for offset in range(batch)), epoch=start)


def test_a_batch_that_is_kept_is_never_overwritten(reader, rung):
    with Loader(reader, make_decoder(TRANSFORM, 5, rung), endless(), threads=3, prefetch=2) as loader:
        kept = [next(loader) for _ in range(3)]
        one_image = next(loader).images[1]
        array = next(loader).images[2].numpy()
        expected = [batch.images.clone() for batch in kept], one_image.clone(), array.copy()
        for _ in range(40):
            next(loader)
        for batch, pixels in zip(kept, expected[0], strict=True):
            assert batch.images.equal(pixels)
        assert one_image.equal(expected[1])
        np.testing.assert_array_equal(array, expected[2])
    assert one_image.equal(expected[1])


def test_memory_is_used_again_and_what_was_kept_comes_back(reader):
    with Loader(reader, make_decoder(TRANSFORM, 5), endless(), threads=2, prefetch=2) as loader:
        for _ in range(3):
            batch = next(loader)
        addresses = set()
        for _ in range(30):
            batch = next(loader)
            addresses.add(batch.images.data_ptr())
        assert len(addresses) <= 5
        kept = [next(loader) for _ in range(8)]
        more = {batch.images.data_ptr() for batch in kept}
        assert len(more) == 8
        del kept, batch
        gc.collect()
        later = set()
        for _ in range(30):
            batch = next(loader)
            later.add(batch.images.data_ptr())
        assert len(later) <= 8 and len(later & more) >= 2


def test_slabs_of_another_size_are_not_mixed_up():
    ring = SlabRing(most=3)
    small, large = (2, 8, 8, 3), (2, 16, 16, 3)
    tensor = ring.hand_out(ring.take(small))
    del tensor
    assert ring.take(large).pixels.shape == large
    assert ring.take(small).pixels.shape == small


def test_a_slab_of_the_old_size_that_comes_back_late_costs_none_of_the_new():
    ring = SlabRing(most=3)
    small, large = (2, 8, 8, 3), (2, 16, 16, 3)
    kept = ring.hand_out(ring.take(small))
    good = [ring.take(large) for _ in range(2)]
    del kept
    for slab in good:
        ring.hand_out(slab)
    assert [ring.take(large) for _ in range(2)] == good


class Event:
    """A CUDA event that is done when it is told."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.done = False

    def record(self, stream: str) -> None:
        assert stream == "copies", "what is computed is not waited for"
        self.log.append("recorded")

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.log.append("waited")


def test_a_slab_is_not_filled_before_its_copy_to_the_device_is_done():
    ring, shape, log = SlabRing(most=5), (1, 4, 4, 3), []
    taken = [ring.take(shape) for _ in range(3)]
    addresses = [slab.pixels.ctypes.data for slab in taken]
    for slab in taken:
        ring.hand_out(slab)
    ring._collect()
    for slab in ring._free:
        slab.copied = Event(log)
    first, *_ = list(ring._free)
    assert len(ring._free) == 3
    # as many as may wait do: then the oldest is waited for
    assert ring.take(shape).pixels.ctypes.data == addresses[0] and log == ["waited"]
    fresh = ring.take(shape)
    assert fresh.pixels.ctypes.data not in addresses and log == ["waited"]
    ring._free[0].copied.done = True
    assert ring.take(shape).pixels.ctypes.data == addresses[1] and log == ["waited", "waited"]
    assert first is taken[0]


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretends that there is a device; what is asked of its events."""
    log: list[str] = []
    empty = torch.empty
    monkeypatch.setattr(slabs.torch.cuda, "Event", lambda blocking: Event(log))
    monkeypatch.setattr(slabs.torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    return log


@pytest.mark.parametrize("then", ["filled", "of another size", "too many"])
def test_an_event_is_recorded_on_return_and_waited_for_before_the_slab_is(then, pinned):
    ring, shape = SlabRing(most=1 if then == "too many" else slabs.SPARE, copied_on="copies"), (1, 4, 4, 3)
    taken = [ring.take(shape) for _ in range(slabs.SPARE)]
    assert pinned == []
    for slab in taken:
        ring.hand_out(slab)
    ring.take((1, 8, 8, 3) if then == "of another size" else shape)
    # one for all that came back together, and only after they did
    assert pinned[0] == "recorded" and pinned.count("recorded") == 1
    assert pinned.count("waited") == {"filled": 1, "of another size": slabs.SPARE, "too many": slabs.SPARE - 1}[then]


# ---------------------------------------------------------------- slices, files, counts


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (5, 8), (32, 2), (32, 16), (256, 1), (256, 64), (1000, 3)])
def test_slices_cover_a_batch_and_leave_work_for_every_thread(count, threads):
    parts = slices(count, threads)
    assert [number for part in parts for number in range(count)[part]] == list(range(count))
    assert max(len(range(count)[part]) for part in parts) <= LARGEST_SLICE
    assert len(parts) >= min(threads, count // 4)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def extents_of(reader: ShardReader, ids: np.ndarray) -> list[bytes]:
    with reader.extents(ids) as found:
        assert found.labels.tolist() == reader.split.samples[ids]["label"].tolist()
        shards = reader.split.samples[ids]["shard"]
        first = np.cumsum([0, *(shard.samples for shard in reader.split.shards)])
        assert found.extents["row"].tolist() == (ids - first[shards]).tolist()
        return [os.pread(int(e["descriptor"]), int(e["size"]), int(e["offset"])) for e in found.extents]


@pytest.mark.parametrize("most_open", [0, 3, 4096])
def test_extents_are_where_the_images_lie_however_many_files_stay_open(tiny_shards, monkeypatch, most_open):
    monkeypatch.setattr(readers, "MOST_OPEN", most_open)
    split = load_split(tiny_shards, "train")
    before = open_files()
    reader = ShardReader(split)
    ids = np.random.default_rng(0).permutation(130)[:50].astype(np.int64)
    for _ in range(2):
        assert extents_of(reader, ids) == [reader.read(int(sample)).image for sample in ids]
        assert len(os.listdir("/proc/self/fd")) <= before + most_open  # noqa: PTH208
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.fixture
def mixed(tmp_path) -> Path:
    """40 images in one shard: number 7 is a PNG, 11 a progressive JPEG, 13 a CMYK JPEG, all others baseline."""
    generator = np.random.default_rng(0)
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    for number in range(40):
        image = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        content = io.BytesIO()
        if number == 7:
            image.save(content, "PNG")
        else:
            image.convert("CMYK" if number == 13 else "RGB").save(content, "JPEG", progressive=number == 11)
        suffix = "png" if number == 7 else "jpg"
        (tmp_path / "images" / "train" / "cat" / f"{number:03}.{suffix}").write_bytes(content.getvalue())
    out = tmp_path / "shards"
    assert shards_main(["prepare", "imagefolder", str(tmp_path / "images"), str(out), "--workers", "1"]) == 0
    return out


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_what_decoded_what_is_counted_whatever_the_threads(mixed, rung, threads):
    counts = {
        "native": {"native": 37, "indexed": 37, "simplejpeg": 1, "pillow": 2, "native_unsupported": 3},
        "simplejpeg": {"simplejpeg": 38, "pillow": 2},
        "pillow": {"pillow": 40},
    }[rung]
    if "simplejpeg" in counts:
        counts["simplejpeg_unsupported"] = 2
    split = load_split(mixed, "train")
    with (
        contextlib.closing(ShardReader(split)) as reader,
        Loader(
            reader, make_decoder(TRANSFORM, 0, rung), [request_of(*range(40))] * 3, threads=threads, prefetch=2
        ) as loader,
    ):
        next(loader)
        assert loader.take_tally().figures() == counts, "not of what is loaded ahead"
        next(loader)
        next(loader)
        assert loader.take_tally().figures() == {field: 2 * images for field, images in counts.items()}
        assert loader.take_tally().figures() == {}


def test_stale_crop_index_records_are_counted_and_change_nothing(mixed):
    if rungs.missing("native") is not None:
        pytest.skip("no C extension")
    split = load_split(mixed, "train")
    path = split.shards[0].path.with_suffix(".cropindex")
    batches, counts = [], []
    for _ in range(2):
        with (
            contextlib.closing(ShardReader(split)) as reader,
            Loader(reader, make_decoder(TRANSFORM, 0), [request_of(*range(40))], threads=2, prefetch=1) as loader,
        ):
            batches.append(next(loader).images)
            counts.append(loader.take_tally())
        content = bytearray(path.read_bytes())
        path.chmod(0o644)
        content[-40:] = bytes(40)  # within the last record
        path.write_bytes(content)
    assert batches[0].equal(batches[1])
    assert [tally["stale"] for tally in counts] == [0, 1]
    assert [tally["indexed"] for tally in counts] == [37, 36]


def test_what_could_not_be_kept_open_is_read_by_itself(reader, rung):
    """As `cached.CachedReader` has it, where a shard has gone again."""

    class Forgetful(ShardReader):
        @contextlib.contextmanager
        def extents(self, samples: np.ndarray) -> Iterator[Located]:
            with super().extents(samples) as found:
                found.extents["descriptor"][::3] = NOT_OPEN
                found.labels[::3] = -7
                yield found

    batches = []
    for source in (reader, Forgetful(reader.split)):
        with Loader(
            source, make_decoder(TRANSFORM, 5, rung), [request_of(*range(40))], threads=2, prefetch=1
        ) as loader:
            batches.append(next(loader))
            assert loader.take_tally()[rung] == 40
    assert batches[0].images.equal(batches[1].images) and batches[0].labels.equal(batches[1].labels)


def test_images_in_memory_are_decoded_by_the_same_rungs(reader, rung):
    """As `stream.StreamReader` has them: no file to read."""

    class InMemory:
        def __init__(self) -> None:
            self.split = reader.split

        def extents(self, samples: np.ndarray) -> None: ...

        def read(self, sample: int) -> Encoded:
            return reader.read(sample)

        def expect(self, position: int) -> None: ...

        def passed(self, position: int) -> None: ...

        def interrupt(self) -> None: ...

    batches = []
    for source in (reader, InMemory()):
        requests = [request_of(*range(20), epoch=epoch) for epoch in (None, 0)]
        with Loader(source, make_decoder(TRANSFORM, 5, rung), requests, threads=2, prefetch=1) as loader:
            batches.append([(batch.images.clone(), batch.labels) for batch in loader])
            assert loader.take_tally()[rung] == 40
    for (pixels, labels), (expected, expected_labels) in zip(*batches, strict=True):
        assert pixels.equal(expected) and labels.equal(expected_labels)


# ---------------------------------------------------------------- shutdown


class SlowDecoder(Decoder):
    """Each image takes half a second."""

    @property
    def reads_files(self) -> bool:
        return False

    def image(self, *arguments) -> None:
        time.sleep(0.5)


def test_closing_waits_for_the_images_under_way_and_not_for_their_slices(reader):
    before = threading.active_count()
    loader = Loader(reader, SlowDecoder(TRANSFORM, 0, ["pillow"]), endless(64), threads=2, prefetch=4)
    loader._submit_ahead()
    time.sleep(0.2)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2
    assert threading.active_count() == before


def test_closing_does_not_wait_for_a_slice_of_large_files(tmp_path):
    if rungs.missing("native") is not None:
        pytest.skip("no C extension")
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8))
    noise.save(tmp_path / "images" / "train" / "cat" / "noise.jpg", quality=95, subsampling=0)
    out = tmp_path / "shards"
    assert shards_main(["prepare", "imagefolder", str(tmp_path / "images"), str(out), "--workers", "1"]) == 0
    transform = Transform(size=24, evaluation_resize=28, crop="none")
    with contextlib.closing(ShardReader(load_split(out, "train"))) as reader:
        for epoch in (0, None):
            request = request_of(*[0] * (2 * LARGEST_SLICE), epoch=epoch)  # slices of several seconds each
            loader = Loader(reader, make_decoder(transform, 0, "native"), [request], threads=1, prefetch=1)
            loader._submit_ahead()
            time.sleep(0.1)
            began = time.monotonic()
            loader.close()
            assert time.monotonic() - began < 1
