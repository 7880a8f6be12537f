"""Stopping on all ranks after the same update, without a collective per update.

Ranks begin an update only together, but none knows how far the others have got with it, and on a GPU the hosts run
ahead of their devices. So one that is told to stop cannot simply do so: another would wait for it for ever inside the
next all-reduce. Instead rank 0 asks, every rank answers with the update that it is in and begins no other before rank 0
has told the largest of the answers; all go on to that one, and stop.

The answers come from a thread beside the training (`pipeline.watch`), so a rank that waits inside an update answers
too: nothing here waits for the training, and until somebody wants to stop an update costs one comparison.
"""

from __future__ import annotations

import threading

import torch.distributed as dist

WANTED, ASKED, UPDATE = "stop/wanted", "stop/asked", "stop/update"


class Stop:
    """The agreement, on one rank.

    Attributes:
        why: what asked for it, in words; empty while nobody has.

    Args:
        rank, size: this rank among how many.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.why = ""
        self._rank, self._size = rank, size
        self._changed = threading.Condition()
        self._begun = 0  # updates, this one included
        self._limit: int | None = None  # no update beyond it is begun before the last one is known
        self._last: int | None = None

    def resume_at(self, step: int) -> None:
        """The training begins with `step` updates done."""
        self._begun = step

    def want(self, why: str) -> None:
        """Ask all ranks to stop; called anywhere, a signal handler included."""
        self.why = self.why or why

    def may_begin(self, step: int) -> bool:
        """Whether the update after `step` updates is to be done; False on all ranks after the same one.

        Waits for the other ranks' answers where somebody wants to stop.
        """
        with self._changed:
            while self._limit is not None and step >= self._limit and self._last is None:
                self._changed.wait()
            if self._last is not None and step >= self._last:
                return False
            self._begun = step + 1
            return True

    def exchange(self, store: dist.Store) -> None:
        """Take the agreement one step further; called every second by a thread beside the training.

        Args:
            store: shared by the ranks; its keys are the agreement's own.
        """
        if self._last is not None:
            return
        if self.why and not store.check([WANTED]):
            store.set(WANTED, self.why)
        if self._rank == 0 and self._limit is None and store.check([WANTED]):
            store.set(ASKED, store.get(WANTED).decode())
        if self._limit is None:
            if not store.check([ASKED]):
                return
            self.why = store.get(ASKED).decode()
            with self._changed:
                self._limit = self._begun
            store.set(f"stop/answer/{self._rank}", str(self._limit))
        if self._rank == 0:
            answers = [f"stop/answer/{rank}" for rank in range(self._size)]
            if store.check(answers):
                store.set(UPDATE, str(max(int(answer) for answer in store.multi_get(answers))))
        if store.check([UPDATE]):
            with self._changed:
                self._last = int(store.get(UPDATE))
                self._changed.notify_all()
