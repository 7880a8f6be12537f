"""The child process of gpu.py: one section, in a process of its own; every result is a line of JSON, printed at once.

    python benchmarks/gpu_measure.py SECTION SETTINGS [WHAT]

WHAT is JSON, for sections that are run once for each of several things.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from gpu_points import Say, Settings, brief


def section(name: str) -> Callable[[Settings, Say, dict[str, Any]], None]:
    """The function that measures a section; what its module imports is needed by few."""
    if name in ("machine", "ceilings"):
        import gpu_machine as module
    elif name in ("data", "end-to-end"):
        import gpu_input as module
    elif name in ("correctness", "synchronisations"):
        import gpu_checks as module
    elif name == "profile":
        import gpu_profile as module
    else:
        import gpu_steps as module
    return getattr(module, name.replace("-", "_"))


def main() -> None:
    name, settings = sys.argv[1], Settings.from_json(sys.argv[2])
    what = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    # libraries print: what they say goes to stderr, so that stdout has lines of JSON alone
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**result: Any) -> None:
        print(json.dumps(result), file=answer, flush=True)

    code = 0
    try:
        import torch

        warnings.filterwarnings("ignore")
        if not settings.compile:
            torch.compiler.set_stance("force_eager")
        section(name)(settings, say, what)
    except BaseException as error:
        traceback.print_exc()
        say(failed=brief(error))
        code = 1
    sys.stderr.flush()
    # threads of loaders, watches and compilers must not hold up the next section
    os._exit(code)


if __name__ == "__main__":
    main()
