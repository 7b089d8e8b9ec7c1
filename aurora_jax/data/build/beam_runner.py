"""Running an Apache Beam pipeline: on this machine with several processes, or where Beam has a runner."""

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from apache_beam import Pipeline
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from aurora_jax.errors import InputError

Runner = Literal["direct", "dataflow", "flink", "spark"]
RUNNERS = {"dataflow": "DataflowRunner", "flink": "FlinkRunner", "spark": "SparkRunner"}

OF_A_WORKER = re.compile(r"InputError: (?P<message>.+?)(?: \[while running|\n|$)")
"""An InputError of a worker comes back as text inside another error."""
WRITE_FAILED = re.compile(r'Failed writing: "(?P<path>[^"]+)".*: (?P<why>[^:]+?) \[os_error_code')
"""What TensorStore says of a full disk, wherever Beam puts it."""


def run(add: Callable[[Pipeline], object], runner: Runner, workers: int, options: Sequence[str] = ()) -> None:
    """Runs the pipeline that `add` puts together, to its end.

    Args:
        add: adds transforms to an empty pipeline.
        runner: `direct` is this machine.
        workers: processes of the direct runner; with 1, the pipeline runs in this process.
        options: of the runner, such as "--project=P".

    Raises:
        InputError: a worker raised one, or could not write.
    """
    # An error of a worker is raised here, with its traceback, besides being logged.
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with errors_named():
            if runner == "direct":
                mode = "in_memory" if workers == 1 else "multi_processing"
                direct = (
                    f"--direct_running_mode={mode}",
                    f"--direct_num_workers={workers}",
                    "--default_sdk_harness_log_level=CRITICAL",
                )
                # Each worker's tokenizer has its share of the cores; on their own they would all take every core.
                os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
                # By its class: by the name DirectRunner it may be Prism, which fetches a program over the network.
                with Pipeline(FnApiRunner(), options=PipelineOptions([*direct, *options])) as root:
                    add(root)
                return
            with Pipeline(RUNNERS[runner], options=PipelineOptions(list(options))) as root:
                add(root)
    finally:
        logger.setLevel(level)


@contextmanager
def errors_named() -> Iterator[None]:
    """Errors of whatever kind a runner makes of a worker's. Raises InputError where it was one, or a write failed."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if failed := WRITE_FAILED.search(str(error)):
            raise InputError(
                f"{failed['path']}: cannot be written: {failed['why']}; what is done is kept: make room and "
                "give the same command again"
            ) from error
        if found := OF_A_WORKER.search(str(error)):
            raise InputError(found["message"]) from error
        raise


@contextmanager
def watched(look: Callable[[], object], seconds: float) -> Iterator[None]:
    """Looks every so many seconds, in a thread, while the body runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
