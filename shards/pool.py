"""Running one function over many tasks in processes that never outlive their parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from shards.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None = None
) -> Iterator[tuple[Task, Result]]:
    """Call `function` on every task and yield (task, result) as they come, in any order.

    Args:
        function: picklable, as are tasks and results.
        tasks: what to call it on.
        workers: number of processes, by default one per usable core; with 1, everything runs in this process.

    Raises:
        UserError: if a worker is killed from outside. What `function` raises comes through; tasks that have
            not begun are then dropped, those running are waited for.
    """
    workers = min(usable_cores() if workers is None else workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield task, function(task)
        return
    context = multiprocessing.get_context("spawn")  # threads and open files of the caller stay out of the workers
    executor = ProcessPoolExecutor(workers, context, _prepare_worker)
    try:
        with _interrupts_held():
            futures = {executor.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed from outside, by a signal or for lack of memory",
            "What is finished is kept: run the same command again, with fewer --workers if memory was short.",
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while processes start: they inherit that, and none is interrupted in the middle of imports."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _prepare_worker() -> None:
    # Ctrl-C reaches the whole process group: workers then end at once, the parent alone reports
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Wait for the end of a pipe that only the parent holds open, which holds after its SIGKILL as well."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
