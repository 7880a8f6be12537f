"""What a measurement depends on besides the code: processor and versions."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg")


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Of Python and the libraries that several rows use."""
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        from PIL import features
    except ImportError:
        return found
    return found | {"Pillow's libjpeg-turbo": str(features.version("libjpeg_turbo"))}
