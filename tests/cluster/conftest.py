"""Clusters for the tests of this folder, which are marked `root`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.hosts import Cluster, missing


@pytest.fixture(scope="module")
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes a `Cluster` of its arguments, which ends with the module's tests.

    A fixture of scope module that calls it has one cluster for all tests of a module; a test that calls it, its own.
    """
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as ending:

        def make(size: int, **options: Any) -> Cluster:
            return ending.enter_context(Cluster(size, **options))

        yield make
