"""Stands for `aurora train` on the hosts of tests/test_launch.py: writes down how it was started and does
what FAKE_CLOUD/orders say.

The environment of a host has a `bin/python` that runs this in place of `python -m aurora_jax`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

WANTED = ("JAX_", "MEGASCALE_", "AURORA_", "EXTRA")


def main() -> int:
    folder = Path(os.environ["FAKE_CLOUD"])
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(WANTED) and name != "JAX_PLATFORMS"
    }
    start = {
        "host": Path(os.environ["HOME"]).name,
        "arguments": sys.argv[1:],
        "environment": environment,
        "pid": os.getpid(),
    }
    with (folder / "starts.jsonl").open("a") as log:
        log.write(json.dumps(start) + "\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("training", flush=True)
    orders = folder / "orders"
    while True:
        for name in (start["host"], "all"):
            if (orders / name).exists():
                return int((orders / name).read_text())
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
