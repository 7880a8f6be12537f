"""Saving beside the training: the loop waits while the state is copied, and a thread writes the copy.

The copy goes into memory that is kept for the next save. One save is in flight at a time: the next one waits for it.
What the thread meets is raised in the training loop, at its next update or at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pipeline import checkpoint
from pipeline.plan import Plan


@dataclass(frozen=True)
class Saved:
    """A save that is on disk.

    Attributes:
        folder: where.
        samples: consumed.
        step: updates done.
        seconds: that it took to write it and to remove old ones.
        held: seconds that the training loop stood still for it, and for the save before it if that was not written.
    """

    folder: Path
    samples: int
    step: int
    seconds: float
    held: float = 0.0


class Snapshot:
    """Copies of tensors in CPU memory, which is allocated once; pinned for those that are on a GPU."""

    def __init__(self) -> None:
        self._memory: dict[tuple, torch.Tensor] = {}

    def take(self, tree: Any) -> Any:
        """Tensors in mappings, lists and tuples → the same with copies, good until the next `take`.

        A tensor that changes as soon as this has returned does not change its copy.
        """
        devices: set[torch.device] = set()
        copied = self._copy(tree, (), devices)
        for device in devices:
            torch.cuda.synchronize(device)
        return copied

    def _copy(self, value: Any, place: tuple, devices: set[torch.device]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), place, devices)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*place, key), devices) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*place, index), devices) for index, item in enumerate(value))
        return value

    def _copy_tensor(self, tensor: torch.Tensor, place: tuple, devices: set[torch.device]) -> torch.Tensor:
        memory = self._memory.get(place)
        # in the tensor's own layout, so that it is one block to copy; whoever writes it puts it in order
        if memory is None or (memory.shape, memory.dtype, memory.stride()) != (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        ):
            memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._memory[place] = memory
        if tensor.is_cuda:
            devices.add(tensor.device)
        return memory.copy_(tensor, non_blocking=tensor.is_cuda)


class Saver:
    """The saves of one run; only rank 0 has one. A context manager: leaving it waits for the save in flight.

    Args:
        plan: the resolved run; `recipe.checkpoint.background` says whether saves are written beside the training.
        classes: that the network tells apart.
        report: called in the thread of the training loop with every save that has reached the disk.
    """

    def __init__(self, plan: Plan, classes: int, report: Callable[[Saved], None]) -> None:
        self._plan = plan
        self._classes = classes
        self._report = report
        self._snapshot = Snapshot()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._writing: Future[Saved] | None = None
        self._held = 0.0

    def save(self, model: nn.Module, state: Mapping[str, Any], *, samples: int, step: int) -> None:
        """Save what `model` and `state` are at this moment; they may change as soon as this has returned.

        Args:
            model: its weights and statistics are saved.
            state: the engine's.
            samples: consumed.
            step: updates done.

        Raises:
            UserError: the save before this one could not be written, or this one where nothing is done beside.
        """
        began = time.perf_counter()
        self.wait()
        weights = model.state_dict()
        if self._plan.config.recipe.checkpoint.background:
            weights, state = self._snapshot.take((weights, state))
            self._writing = self._writer.submit(self._write, weights, state, samples, step)
            self._held = time.perf_counter() - began
        else:
            written = self._write(weights, state, samples, step)
            self._report(replace(written, held=time.perf_counter() - began))

    def poll(self) -> None:
        """Report the save in flight if it is written; for every update, as it costs nothing.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, if there is one, and report it.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._report(replace(writing.result(), held=self._held))

    def settle(self, seconds: float) -> None:
        """Give the save in flight, if there is one, so long to be written; for a process that is about to end."""
        if self._writing is not None:
            futures.wait([self._writing], seconds)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as late:
            if error is None:
                raise
            print(f"onehour: {late}", file=sys.stderr, flush=True)  # what ended the run is raised, and not this
        finally:
            self._writer.shutdown()

    def _write(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Any], samples: int, step: int) -> Saved:
        began = time.perf_counter()
        folder = checkpoint.save(self._plan, weights, state, samples=samples, step=step, classes=self._classes)
        return Saved(folder, samples, step, seconds=time.perf_counter() - began)
