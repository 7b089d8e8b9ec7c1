"""The processes of one run, one a host: how they find each other, agree, and stop together."""

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from aurora_jax.errors import InputError
from aurora_jax.storage.places import Place, is_remote

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DISTRIBUTED, HEARTBEAT = "AURORA_DISTRIBUTED", "AURORA_HEARTBEAT_SECONDS"
HELP = f"""Several hosts train one model when each starts this command with, in its environment,
  {ADDRESS}=HOST:PORT  {COUNT}=N  {INDEX}=0..N-1   (HOST is the machine of process 0), or
  {DISTRIBUTED}=auto   where JAX finds them itself: TPU pods and slices, GKE, Slurm, Open MPI.
`launch_tpu.sh run` sets them. --output must then be storage that all hosts share. When one of them dies the others end
with an error within {HEARTBEAT} (100), so that all can be started again."""
VISIBLE_SECONDS = 60.0
"""How long the other hosts look for a file that process 0 has just written; network file systems cache what
is not there."""


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of the run that the environment describes; does nothing where it describes none.

    Raises:
        InputError: the description is incomplete or not a number.
    """
    given = [name for name in (ADDRESS, COUNT, INDEX) if environment.get(name)]
    automatic = environment.get(DISTRIBUTED)
    if automatic not in (None, "", "auto"):
        raise InputError(f"{DISTRIBUTED}={automatic}: the one value is auto.")
    if not given and not automatic:
        return None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        heartbeat = int(environment.get(HEARTBEAT, "100"))
        if automatic:
            return jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
        if len(given) < 3:
            raise InputError(
                f"{' and '.join(given)} alone does not describe a run over several hosts: set {ADDRESS}, "
                f"{COUNT} and {INDEX}."
            )
        count, index = int(environment[COUNT]), int(environment[INDEX])
    except ValueError as error:
        raise InputError(f"{ADDRESS}, {COUNT}, {INDEX}, {HEARTBEAT}, {DISTRIBUTED}: {error}") from error
    if not 0 <= index < count:
        raise InputError(f"{INDEX}={index} is not one of the {count} processes of {COUNT}.")
    return jax.distributed.initialize(environment[ADDRESS], count, index, heartbeat_timeout_seconds=heartbeat)


def is_first() -> bool:
    """Is this the process that writes what is written once: metrics, TensorBoard, the tokenizer?"""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_first(value: int) -> int:
    """The value that process 0 has, below 2**31."""
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def require_shared(output: Place) -> None:
    """Do all processes see the same folder? With a folder a host, each would write a part of every
    checkpoint, and none a whole one.

    Raises:
        InputError: they do not; raised on all of them.
    """
    if jax.process_count() == 1:
        return
    mark = output / f".shared-{of_first(secrets.randbits(31))}"
    if is_first():
        mark.write_bytes(b"")
    wait_for_all("mark written")
    end = time.monotonic() + VISIBLE_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < end:
        if not is_remote(output):
            os.scandir(output).close()  # NFS looks again
        time.sleep(0.5)
    blind = np.flatnonzero(~np.ravel(multihost_utils.process_allgather(np.array([seen]))))
    if is_first():
        mark.unlink()
    if blind.size:
        raise InputError(
            f"--output {output} is not storage that all hosts share: processes {', '.join(map(str, blind))} "
            f"of {jax.process_count()} do "
            "not see what process 0 writes there. Use a network file system or a bucket (--output gs://B/...)."
        )


@contextmanager
def stop_requested() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step that says whether SIGTERM (a preemption notice) or Ctrl-C has arrived.

    Of several processes any may be told, and all stop after the same step: JAX's preemption service agrees on
    it, and it catches SIGTERM. Ctrl-C then ends the process at once; a single process stops well, and a
    second Ctrl-C interrupts it.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []

    def remember(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous: dict[int, Callable | int | None] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    for number in previous:
        signal.signal(number, remember)
    try:
        yield lambda step: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
