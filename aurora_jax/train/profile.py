"""XProf traces of some steps of a run."""

import contextlib
import tempfile
from pathlib import Path
from types import TracebackType

import jax

from aurora_jax.storage.places import Place, is_remote


class StepTrace:
    """Traces steps first..last of a run into FOLDER/plugins/profile/TIME/HOST.xplane.pb, where TensorBoard
    and XProf look for them.

    Every process writes a file of its own. A run that ends before `last` keeps what it has traced.
    """

    def __init__(self, folder: Place, steps: tuple[int, int] | None):
        self._folder, self._steps = folder, steps
        self._running = False
        self._scratch = tempfile.TemporaryDirectory(prefix="aurora-profile-") if steps and is_remote(folder) else None

    def before(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Begins to trace if it is time; returns the mark under which XProf shows the step."""
        if self._steps is not None and not self._running and self._steps[0] <= step <= self._steps[1]:
            options = jax.profiler.ProfileOptions()
            # Python's own calls would slow the host down and fill the trace; JAX's annotations are in it all the same.
            options.python_tracer_level = 0
            jax.profiler.start_trace(
                self._scratch.name if self._scratch else str(self._folder), profiler_options=options
            )
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, metrics: object) -> None:
        """Ends the trace with its last step; `metrics` are the step's, and are waited for."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._steps = False, None
        if self._scratch is not None:
            traced = Path(self._scratch.name)
            with contextlib.suppress(Exception):  # a trace is not worth a run
                for file in traced.rglob("*"):
                    if file.is_file():
                        (self._folder / file.relative_to(traced)).write_bytes(file.read_bytes())
