"""Where a run's time has gone since it was first started, over all its starts: OUTPUT/goodput.json.

Goodput is the share of the time since the first start in which steps were done that counted. What was lost has a cause:

start_up          before the first step: imports of data, opening stores, restoring
compiling         wherever programs were compiled
waiting_for_data  the loop had no batch yet
checkpoints       the part of a save for which the loop waits
evaluation        held-out text and samples
skipped_steps     updates that were not made, or whose batch was left out
repeated_steps    done before, after the checkpoint that an interrupted start went on from
down              between the last sign of one start and the next start

PyPI's `ml-goodput-measurement` gives such figures from Google Cloud Logging, which a run here need not have.
"""

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from aurora_jax.errors import InputError
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Place
from aurora_jax.storage.records import object_in
from aurora_jax.train.processes import is_first

NAME = "goodput.json"
CAUSES = (
    "start_up",
    "compiling",
    "waiting_for_data",
    "checkpoints",
    "evaluation",
    "skipped_steps",
    "repeated_steps",
    "down",
)
STEPS = "steps"
"""Beside the causes: seconds of the steps that counted."""
SIGN_SECONDS = 30.0
"""Between two signs of life in the file: by so much can `down` be too long."""

Item = TypeVar("Item")


class Goodput:
    """The clock of one start; to be made when it begins.

    Args:
        output: the run's folder. The first process writes there; the others only count.
    """

    def __init__(self, output: Place):
        self._path = output / NAME
        now = time.time()
        self._earlier: dict[str, Any] = {}
        if self._path.exists():
            try:
                self._earlier = object_in(self._path.read_bytes(), self._path)
            except InputError as error:
                print(f"{error} The account of the time begins anew.", flush=True)
        self._since = self._earlier.get("since", now)
        self._before = dict.fromkeys((STEPS, *CAUSES), 0.0) | self._earlier.get("seconds", {})
        self._before["down"] += max(0.0, now - self._earlier.get("last_sign", now))
        self._starts = self._earlier.get("starts", 0) + 1
        self._begun = time.monotonic()
        self._lost = dict.fromkeys(CAUSES, 0.0)
        self._in_steps, self._done, self._skipped = False, 0, 0
        self._on_devices = 0.0
        self._counted = (0, 0.0)  # steps, and seconds of this host, when host_seconds was last asked
        self._step: int | None = self._earlier.get("step")
        self._signed = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def begin_steps(self, first_step: int) -> None:
        """The loop begins: what went before was start-up, and what an earlier start had done beyond it is repeated."""
        self._lost["start_up"] = time.monotonic() - self._begun - self._lost["compiling"]
        self._in_steps = True
        repeated = max(0, self._earlier.get("step", first_step) - first_step) * self._earlier.get("step_seconds", 0.0)
        repeated = min(repeated, self._before[STEPS])
        self._before[STEPS] -= repeated
        self._before["repeated_steps"] += repeated

    @contextmanager
    def lost(self, cause: str) -> Iterator[None]:
        """The time of the block is lost to this cause, but for what it compiles."""
        begun, compiled = time.monotonic(), self._lost["compiling"]
        try:
            yield
        finally:
            self._lost[cause] += time.monotonic() - begun - (self._lost["compiling"] - compiled)

    def waiting(self, batches: Generator[Item, None, None]) -> Iterator[Item]:
        """The same items; the time until each is there is lost to waiting for data."""
        with closing(batches):
            while True:
                try:
                    with self.lost("waiting_for_data"):
                        item = next(batches)
                except StopIteration:
                    return
                yield item

    @contextmanager
    def on_devices(self) -> Iterator[None]:
        """The time of the block is spent waiting for devices."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._on_devices += time.monotonic() - begun

    def host_seconds(self) -> list[float]:
        """Of each process, the seconds a step, since this was last asked, in which it did not wait for devices: its
        batch was not there yet, or its own work took so long. A host that is slow keeps all others waiting, who then
        wait for devices. A collective; empty if no step was done."""
        lost = sum(seconds for cause, seconds in self._lost.items() if cause != "waiting_for_data")
        own = time.monotonic() - self._begun - lost - self._on_devices
        steps, since = self._done - self._counted[0], own - self._counted[1]
        self._counted = (self._done, own)
        if steps == 0:
            return []
        mine = np.array([max(0.0, since) / steps], np.float32)
        if jax.process_count() == 1:
            return mine.tolist()
        with jax.transfer_guard("allow"):
            return np.ravel(multihost_utils.process_allgather(mine)).tolist()

    def step(self, done: int, *, counted: bool) -> None:
        """A step is done, `done` in all; whether its update was made."""
        self._done, self._step = self._done + 1, done
        self._skipped += not counted
        if time.monotonic() - self._signed > SIGN_SECONDS:
            self.write()

    def seconds(self) -> dict[str, float]:
        """Seconds of steps that counted, and of each cause, over all starts until now."""
        lost = {**self._lost, "skipped_steps": self._skipped * self.step_seconds()}
        if not self._in_steps:
            lost["start_up"] = time.monotonic() - self._begun - lost["compiling"]
        here = {STEPS: time.monotonic() - self._begun - sum(lost.values()), **lost}
        return {name: self._before[name] + here[name] for name in here}

    def write(self) -> None:
        """A sign of life, with what is known."""
        self._signed = time.monotonic()
        if not is_first():
            return
        seconds = self.seconds()
        values = {
            "since": self._since,
            "last_sign": time.time(),
            "starts": self._starts,
            **({} if self._step is None else {"step": self._step, "step_seconds": self.step_seconds()}),
            "goodput": share_of(seconds),
            "seconds": seconds,
        }
        try:
            write_file(self._path, json.dumps(values, indent=1) + "\n")
        except Exception as error:  # an account is not worth a run; whatever the storage raises
            print(f"{self._path} could not be written: {error}", flush=True)

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, *_: object) -> None:
        """Writes the last state and stops listening to the compiler."""
        self.write()
        jax.monitoring.unregister_event_duration_listener(self._compiled)

    def sentence(self) -> str:
        """For people."""
        return described({"starts": self._starts, "seconds": self.seconds()})

    def step_seconds(self) -> float:
        """Of this start, or of the one before while no step is done."""
        if not self._done:
            return self._earlier.get("step_seconds", 0.0)
        return max(0.0, time.monotonic() - self._begun - sum(self._lost.values())) / self._done

    def _compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, the compiler
            self._lost["compiling"] += duration_secs


def share_of(seconds: Mapping[str, float]) -> float:
    """The one number, between 0 and 1."""
    return seconds[STEPS] / max(sum(seconds.values()), 1e-9)


def slow_host(host_seconds: Sequence[float], step_seconds: float) -> str | None:
    """Who keeps the others waiting, in a sentence: a process that takes more than a tenth of a step, and twice as much
    as most of the others."""
    if len(host_seconds) < 2:
        return None
    slowest = int(np.argmax(host_seconds))
    usual = float(np.median(np.delete(host_seconds, slowest)))
    if host_seconds[slowest] < max(0.1 * step_seconds, 2 * usual):
        return None
    return (
        f"process {slowest} keeps the others waiting: {host_seconds[slowest]:.3f} s of its own a step, where others "
        f"have {usual:.3f} s, and a step takes {step_seconds:.3f} s"
    )


def described(values: dict[str, Any]) -> str:
    """What goodput.json says, in a sentence."""
    seconds = values["seconds"]
    lost = sorted(((seconds[cause], cause) for cause in CAUSES if seconds.get(cause, 0) >= 0.5), reverse=True)
    named = ", ".join(f"{cause.replace('_', ' ')} {spent:,.0f} s" for spent, cause in lost)
    starts = values["starts"]
    return (
        f"goodput {share_of(seconds):.1%}: {seconds[STEPS]:,.0f} s of steps in {sum(seconds.values()):,.0f} s since "
        f"the first of {starts} start{'s' if starts > 1 else ''}" + (f"; lost: {named}" if named else "")
    )
