"""A run that hangs ends itself: of several processes one that hangs stops all others, and nobody dies.

JAX's heartbeats see a process that is gone, not one that stands still. Each process therefore counts the seconds since
its loop last came by, and ends with HUNG when they are too many; whoever supervises it starts it again. The count is of
ticks, not of a clock: a laptop that slept, or a process that was stopped as a whole, has not hung.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from aurora_jax.errors import HUNG
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Place, is_remote

SIGNS = "processes"
"""Folder in OUTPUT where each process of several leaves a sign of life."""
SIGN_TICKS, SIGN_TICKS_REMOTE = 10, 60
"""Ticks between two signs, on a file system and in a bucket, where each is paid for; a
process without one for three times as long is named."""
SLOW = 4.0
"""By how much longer a phase may take in which no step ends: compiling, evaluations, checkpoints."""


class Watchdog:
    """To be entered around a run's loop.

    Args:
        output: the run's folder.
        seconds: without a sign from the loop, after which the process ends; 0 for never.
        tick: seconds.
    """

    def __init__(self, output: Place, seconds: float, tick: float = 1.0):
        self._signs, self._seconds, self._tick = output / SIGNS, seconds, tick
        self._sign_ticks = SIGN_TICKS_REMOTE if is_remote(output) else SIGN_TICKS
        self._waited, self._limit, self._doing = 0.0, SLOW * seconds, "the first step"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def feed(self, doing: str) -> None:
        """The loop comes by, and says what it will do now."""
        self._waited, self._limit, self._doing = 0.0, self._seconds, doing

    @contextmanager
    def slow(self, doing: str) -> Iterator[None]:
        """A phase that may take longer than a step."""
        before = self._doing
        self._waited, self._limit, self._doing = 0.0, SLOW * self._seconds, doing
        try:
            yield
        finally:
            self.feed(before)

    def _watch(self) -> None:
        ticks = 0
        while not self._ended.wait(self._tick):
            if ticks % self._sign_ticks == 0 and jax.process_count() > 1:
                with contextlib.suppress(Exception):  # a sign that cannot be left is one that is missed
                    self._leave_sign()
            ticks += 1
            self._waited += self._tick
            if self._waited > self._limit:
                self._end()

    def _leave_sign(self) -> None:
        self._signs.mkdir(exist_ok=True)
        sign = {"time": time.time(), "doing": self._doing, "waited": self._waited}
        write_file(self._signs / f"{jax.process_index()}.json", json.dumps(sign))

    def _end(self) -> None:
        print(
            f"error: {self._doing} has not ended for {self._waited:.0f} s (watchdog_minutes {self._seconds / 60:g}): "
            f"process {jax.process_index()} of {jax.process_count()} ends, to be started again.{self._silent()} What "
            "its threads were doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stdout.flush()
        os._exit(HUNG)

    def _silent(self) -> str:
        """Who has left no sign of life for long."""
        if jax.process_count() == 1:
            return ""
        silent = []
        for index in range(jax.process_count()):
            try:
                sign = json.loads((self._signs / f"{index}.json").read_text())
            except Exception:  # whatever the storage raises
                silent.append(f"process {index} (no sign of it)")
                continue
            age = time.time() - sign["time"]
            if age > 3 * self._sign_ticks * self._tick:
                silent.append(f"process {index} ({age:.0f} s ago it was at {sign['doing']})")
        return f" Silent: {', '.join(silent)}." if silent else " All processes give signs of life."
