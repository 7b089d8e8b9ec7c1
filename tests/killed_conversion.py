"""Run by test_interrupted_conversion.py: conversions that kill themselves (SIGKILL), one after the other,
each in a fork.

python tests/killed_conversion.py ARGUMENTS... [["function", call], ...]
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from convert import from_torch, partial, weight_map
from convert.__main__ import main

CHUNK_BYTES = 500
PLACES: dict[str, tuple[Any, str]] = {
    "skeleton": (from_torch, "write_checkpoint"),
    "block": (partial.Partial, "finish"),
    "commit": (partial.shutil, "rmtree"),
}
"""Functions in whose n-th call the process dies: before the checkpoint without data is there, before a block
is noted, and after the rename."""


def killed_in(place: str, call: int) -> None:
    owner, name = PLACES[place]
    original: Callable = getattr(owner, name)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    *arguments, moments = sys.argv[1:]
    weight_map.CHUNK_BYTES = CHUNK_BYTES
    for place, call in json.loads(moments):
        child = os.fork()  # what takes seconds to import is imported once
        if not child:
            killed_in(place, call)
            main(arguments)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, (place, call)
