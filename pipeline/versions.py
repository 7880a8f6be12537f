"""Versions of Python and of the packages that decide numbers."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

RECORDED_PACKAGES = (
    "onehour",
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "webdataset",
    "numpy",
    "pillow",
    "simplejpeg",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
