"""Encoded images out of shards that can only be read from end to end, through webdataset.

One thread per stream opens its shards one after the other, skips to its piece, and keeps two blocks of images in
memory: the one in use and the next. Which sample comes at which position was decided before, by the order; what
arrives is checked against the index, for a shard with another number of samples would shift everything behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil

from pipeline.reader import Encoded
from pipeline.window import Block, Piece
from shards.errors import UserError
from shards.fetch import mask
from shards.images import IMAGE_EXTENSIONS
from shards.streamed import StreamSplit

BLOCKS_IN_MEMORY = 2
"""Of each stream: the one in use, and the next, which arrives meanwhile."""

PATIENCE = 600.0
"""Seconds without any image, of any stream, after which a read gives up."""

_SECONDS_TO_CLOSE = 3.0
_COMMAND = "pipe:"
_PIPE_BYTES = 1 << 16
_KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class StreamReader:
    """Images of one split in the order of its blocks, each to be read once.

    Args:
        split: the shards and their lengths.
        streams: the blocks of each stream, in the order they are used; may be endless.
    """

    def __init__(self, split: StreamSplit, streams: Sequence[Iterator[Block]]) -> None:
        self.split = split
        self._first_ids = np.concatenate([np.zeros(1, np.int64), np.cumsum(split.counts, dtype=np.int64)])
        self._ready: dict[int, Encoded] = {}
        self._copies: Counter[int] = Counter()  # the end of an epoch and the next one's start may hold the same image
        self._position = self._expected = 0
        self._failure: Exception | None = None
        self._shards = [_Shards(split) for _ in streams]
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, args=(shards, blocks), name=f"stream-{number}", daemon=True)
            for number, (shards, blocks) in enumerate(zip(self._shards, streams, strict=True))
        ]
        for thread in self._threads:
            thread.start()

    def read(self, sample: int) -> Encoded:
        """See `reader.Reader.read`; waits until the stream has come to the sample."""
        with self._changed:
            while sample not in self._ready:
                if self._failure is not None:
                    raise self._failure
                if self._closed:
                    raise RuntimeError(f"{self.describe(sample)}: the reader was closed while it waited for this image")
                if not any(thread.is_alive() for thread in self._threads):
                    raise RuntimeError(f"{self.describe(sample)}: is in no block of this rank's streams")
                if not self._changed.wait(PATIENCE):
                    raise UserError(
                        f"{self.describe(sample)}: nothing has arrived for {PATIENCE:,.0f} s",
                        "The command or the connection that recipe.stream opens hangs. Try it by hand.",
                    )
            return self._ready[sample]

    def extents(self, samples: np.ndarray) -> None:
        """None: the images lie in memory."""

    def expect(self, position: int) -> None:
        """Read the blocks of what is read soon, though they may be more than are kept otherwise."""
        with self._changed:
            self._expected = max(self._expected, position)
            self._changed.notify_all()

    def passed(self, position: int) -> None:
        """Make room for the next blocks."""
        with self._changed:
            self._position = position
            self._changed.notify_all()

    def describe(self, sample: int) -> str:
        """URL and number of the sample in its shard."""
        shard = int(np.searchsorted(self._first_ids, sample, side="right")) - 1
        return f"{mask(self.split.urls[shard])}: sample {sample - int(self._first_ids[shard]):,}"

    def mend(self) -> str:
        """What to do about a damaged image."""
        return "Repair it where the shards lie: shards verify DIR --decode"

    def interrupt(self) -> None:
        """End the threads, the commands they read from, and the waiting for them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for shards in self._shards:
            shards.close()

    def close(self) -> None:
        """As `interrupt`; nothing else is open."""
        self.interrupt()
        deadline = time.monotonic() + _SECONDS_TO_CLOSE
        for thread in self._threads:
            # they are daemons: what cannot be ended does not hold up the end
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, shards: _Shards, blocks: Iterator[Block]) -> None:
        in_memory: deque[tuple[Block, list[int]]] = deque()
        with shards:
            try:
                for block in blocks:
                    if not self._make_room(in_memory, block):
                        return
                    ids: list[int] = []
                    in_memory.append((block, ids))
                    for piece in block.pieces:
                        first = int(self._first_ids[piece.shard]) + piece.start
                        for number, encoded in enumerate(shards.read(piece)):
                            with self._changed:
                                if self._closed:
                                    return
                                ids.append(first + number)
                                self._copies[first + number] += 1
                                self._ready[first + number] = encoded
                                self._changed.notify_all()
            except Exception as error:  # raised by whoever waits for an image: nobody else would hear of it
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()

    def _make_room(self, in_memory: deque[tuple[Block, list[int]]], block: Block) -> bool:
        """Wait until there is room for another block, or it is read soon; False when closed."""
        with self._changed:
            while not self._closed:
                while in_memory and in_memory[0][0].last < self._position:
                    for sample in in_memory.popleft()[1]:
                        self._copies[sample] -= 1
                        if not self._copies[sample]:
                            del self._copies[sample], self._ready[sample]
                if len(in_memory) < BLOCKS_IN_MEMORY or block.first <= self._expected:
                    return True
                self._changed.wait()
            return False


class _Shards:
    """Reads pieces one after the other; one that goes on where the last one ended opens nothing."""

    def __init__(self, split: StreamSplit) -> None:
        self._split = split
        self._stream: Any = None
        self._closed = False
        self._samples: Iterator[dict] = iter(())
        self._at: tuple[int, int] | None = None  # shard, and the row that comes next

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open, from any thread, and open nothing more."""
        self._closed = True
        self._leave()

    def _leave(self) -> None:
        """Close what is open before its end; a command and its children are killed."""
        stream, self._stream = self._stream, None
        process = getattr(stream, "proc", None)
        if process is not None:
            stream.ignore_errors = True  # that it was ended is no fault of the command
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
        if stream is not None:
            stream.close()

    def read(self, piece: Piece) -> Iterator[Encoded]:
        url = self._split.urls[piece.shard]
        try:
            if self._at != (piece.shard, piece.start):
                self._open_at(piece, url)
            for row in range(piece.start, piece.start + piece.samples):
                yield self._encoded(url, next(self._samples, None), piece.shard, row)
                self._at = (piece.shard, row + 1)
            if self._at == (piece.shard, self._split.counts[piece.shard]) and next(self._samples, None) is not None:
                raise self._other_length(url, piece.shard, "has more")
        except UserError:
            raise
        except Exception as error:  # whatever the command, the network or tarfile makes of a damaged stream
            raise UserError(
                f"{mask(url)}: cannot be read: {mask(str(error))}",
                f"It is opened by recipe.stream. Try it by hand, and check {mask(self._split.root)}.",
            ) from error

    def _open_at(self, piece: Piece, url: str) -> None:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        self._leave()
        self._stream = _open(url)
        if self._closed:  # meanwhile
            self._leave()
        self._samples = group_by_keys(tar_file_expander([{"url": url, "stream": self._stream}]))
        for row in range(piece.start):
            if next(self._samples, None) is None:
                raise self._other_length(url, piece.shard, f"has {row:,}")

    def _encoded(self, url: str, sample: dict | None, shard: int, row: int) -> Encoded:
        if sample is None:
            raise self._other_length(url, shard, f"has {row:,}")
        place = f"{mask(url)}: key {sample['__key__']}"
        images = [name for name in sample if name in IMAGE_EXTENSIONS]
        if len(images) > 1:
            raise UserError(
                f"{place}: has {len(images)} images: .{' and .'.join(images)}",
                "Write shards that hold one alone, saying which: "
                f"shards prepare webdataset DIR OUT --image {images[0]}",
            )
        image = sample[images[0]] if images else None
        labels = self._split.labels
        label = sample.get(labels.extension)
        if image is None or label is None:
            raise UserError(
                f"{place}: has no {'image' if image is None else f'label (.{labels.extension})'}",
                f"Every sample needs one image and one {labels.source} with its class.",
            )
        number = labels.number(place, labels.parse(place, label))
        if number >= len(self._split.classes):
            raise UserError(f"{place}: label {number} is outside the {len(self._split.classes):,} classes")
        return Encoded(image, number)

    def _other_length(self, url: str, shard: int, has: str) -> UserError:
        return UserError(
            f"{mask(url)}: {has} samples, the index says {self._split.counts[shard]:,}",
            "Every position after it would be another sample.",
            f"Index the shards again, and renew {mask(self._split.root)}.",
        )


def _open(url: str) -> Any:
    """webdataset's stream of a URL; of a command, in a process that does not outlive this one."""
    from webdataset.gopen import Pipe, gopen

    if not url.startswith(_COMMAND):
        return gopen(url)
    command = url.removeprefix(_COMMAND)
    return Pipe(command, mode="rb", shell=True, bufsize=_PIPE_BYTES, preexec_fn=_end_with_parent)


def _end_with_parent() -> None:
    """In the child, before the shell: SIGKILL once this process is gone, for a command that hangs notices nothing."""
    if _LIBC is not None:
        _LIBC.prctl(_KILLED_WITH_PARENT, signal.SIGKILL)
