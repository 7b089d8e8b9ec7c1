"""What a run tells people: a progress bar, metrics.jsonl, TensorBoard and, on request, Weights & Biases."""

import contextlib
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary import DirectoryOutput, Writer

from aurora_jax.data.look.show_page import harmless
from aurora_jax.evaluate.bits_per_byte import EvaluationSettings
from aurora_jax.evaluate.evaluations import change_since_start, described, start_of
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.storage import line_log
from aurora_jax.storage.line_log import LineLog
from aurora_jax.storage.places import Place, is_remote
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.processes import is_first
from aurora_jax.train.survival.goodput import share_of
from aurora_jax.train.throughput import Throughput
from aurora_jax.train.wandb_run import WandbRun

INTERVAL = 30.0
"""Seconds of steps over which speed is measured."""
LINE_SECONDS = 10.0
"""Where there is no terminal: seconds between two lines of progress."""
ARROW = "⟶"
"""Between a prompt and what the model makes of it."""


class MetricsLog:
    """Writes one JSON object a step (or an evaluation, or its samples) to OUTPUT/metrics.jsonl, the same to TensorBoard
    (and Weights & Biases, if a project is named, but for samples), and shows progress.

    Lines at and beyond the step that a resumed run starts from are dropped first, and TensorBoard is told to forget
    them: each step is there once, however often it was done. Of several processes the first writes and shows; the
    others' logs say nothing.

    Attributes:
        evaluated: (step, whether all held-out text was read) of the evaluations that are there.
    """

    def __init__(self, config: TrainConfig, throughput: Throughput, *, first_step: int):
        output = config.output
        self._first = is_first()
        self.console = Console(quiet=not self._first)
        self._path = output / "metrics.jsonl"
        kept = drop_from(self._path, first_step) if self._first else []
        self._evaluations = [row for row in kept if "evaluation" in row]
        self.evaluated = {(row["step"], row["complete"]) for row in self._evaluations}
        self._file = LineLog(self._path) if self._first else None
        self._events = _EventFiles(output / "tensorboard", first_step) if self._first else None
        for row in kept:
            if row["step"] == first_step:  # it is done, and forgotten with the steps that are to be done again
                self._draw(_curves_of(row), first_step)
                self._draw_samples(row)
        self._wandb = WandbRun(config, config.wandb_project) if self._first and config.wandb_project else None
        self._lines = config.log_format == "lines" or not self.console.is_terminal or not self._first
        self._throughput, self._steps, self._first_step = throughput, config.steps, first_step
        self._begun = self._last_line = time.monotonic()
        self._paused = 0.0
        self._times = deque([0.0])
        self._progress = Progress(
            TextColumn("{task.fields[stage]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False, compact=True),
            console=self.console,
            disable=self._lines,
        )
        self._task = self._progress.add_task(
            "train", total=self._steps, completed=first_step, stage="", loss=float("nan"), rate=""
        )

    def __enter__(self) -> "MetricsLog":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._file and self._events:
            self._file.close()
            self._events.close()
        if self._wandb:
            self._wandb.close()

    def restart_clock(self) -> None:
        """Call when the first step has been done: compilation is not training speed."""
        self._begun, self._paused = time.monotonic(), 0.0
        self._times = deque([0.0])

    def goodput(
        self,
        step: int,
        stage: str,
        seconds: Mapping[str, float],
        epochs: Mapping[str, float],
        host_seconds: Sequence[float] = (),
    ) -> None:
        """Records where the time has gone until now and what each host takes of a step (`goodput.Goodput`), and how
        many epochs of each task have been read."""
        share = share_of(seconds)
        row = {"step": step, "stage": stage, "goodput": share, "seconds": dict(seconds), "epochs": dict(epochs)}
        row |= {"host_seconds": list(host_seconds)} if host_seconds else {}
        curves = {f"goodput/{name}": spent for name, spent in seconds.items()}
        self._write(row, {"goodput": share, **curves, **{f"epochs/{task}": read for task, read in epochs.items()}})

    def flush(self) -> None:
        """Returns when all that was recorded is stored: what a checkpoint has behind it is in the log.

        Raises:
            InputError: the storage refuses it.
        """
        if self._file and self._events:
            self._file.flush()
            self._events.flush()

    def left_out(self, step: int, stage: str) -> None:
        """Records a step whose batch was left out by --rollback."""
        self._write({"step": step, "stage": stage, "left_out": True}, {})
        self._progress.update(self._task, completed=step + 1, stage=stage)

    def step(
        self,
        step: int,
        stage: str,
        metrics: Mapping[str, float],
        task_loss: Mapping[str, float],
        texts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Records one training step; `metrics` as `train_step` returns them, scalars only; `texts` where the rows of
        its batch come from, if its update was skipped.

        Speed is that of the last INTERVAL seconds of steps, without the first, which compiles, and without the time of
        evaluations.
        """
        self._times.append(time.monotonic() - self._begun - self._paused)
        while len(self._times) > 2 and self._times[-1] - self._times[0] > INTERVAL:
            self._times.popleft()
        steps_per_second = (len(self._times) - 1) / max(1e-9, self._times[-1] - self._times[0])
        speed = self._throughput.at(steps_per_second)
        scalars = {**metrics, **speed}
        rate = f"{speed['tokens_per_second']:,.0f} tokens/s" + (f"  MFU {speed['mfu']:.1%}" if "mfu" in speed else "")
        self._write(
            {"step": step, "stage": stage, **scalars, "task_loss": dict(task_loss)}
            | ({"texts": [dict(text) for text in texts]} if texts else {}),
            {f"train/{k}": v for k, v in scalars.items()},
        )
        self._progress.update(self._task, completed=step + 1, stage=stage, loss=metrics["loss"], rate=rate)
        now = time.monotonic()
        if self._lines and (now - self._last_line >= LINE_SECONDS or step + 1 == self._steps):
            self._last_line = now
            remaining = (self._steps - step - 1) / steps_per_second
            self.console.print(
                f"{stage} step {step + 1}/{self._steps}  loss {metrics['loss']:.3f}  lr "
                f"{metrics['learning_rate']:.2e}  "
                f"{rate}  ETA {remaining:.0f} s",
                highlight=False,
            )

    def evaluation(
        self,
        step: int,
        stage: str,
        scores: Mapping[str, Mapping[str, float]],
        settings: EvaluationSettings,
        samples: Sequence[Mapping[str, str]] = (),
        *,
        seconds: float,
    ) -> None:
        """Records scores by task (`Score` as dictionaries) after `step` steps, and how they were measured; shows their
        change since the start, where the same was measured there.

        Args:
            samples: what the model wrote then, as `samples.Sampler` gives it. They are a row of their own, before that
                of the scores: where these are, the samples are.
        """
        self._paused += seconds
        complete = settings.windows is None
        row = {
            "step": step,
            "stage": stage,
            "complete": complete,
            "settings": settings.to_json(),
            "evaluation": dict(scores),
        }
        if samples:
            self._samples({"step": step, "stage": stage, "samples": [dict(sample) for sample in samples]})
        if not self._evaluations:
            self.console.print(f"evaluation: {described(row)}", highlight=False)
        self._evaluations.append(row)
        self._write(row, _curves_of(row))
        start = start_of(self._evaluations, complete=complete)
        changes = {} if start is None or start is row else change_since_start(start, row)
        summary = "  ".join(
            f"{task.removeprefix('sample_')} {score['bits_per_byte']:.3f}"
            + (f" ({changes[task]:+.1%})" if task in changes else "")
            for task, score in scores.items()
        )
        read = "all held-out text" if complete else f"quick, {settings.windows} windows a task"
        masks = "" if settings.attend_across_documents else ", documents isolated"
        self.console.print(
            f"{stage} step {step}  bits per byte ({read}, of {settings.sequence_length:,} tokens{masks}): {summary}",
            highlight=False,
        )

    def _samples(self, row: Mapping) -> None:
        self._write(row, {})
        self._draw_samples(row)
        for sample in row["samples"]:
            text = harmless(f"{sample['prompt']}{ARROW}{sample['continuation']}").replace("\n", "\n    ")
            said = f"{row['stage']} step {row['step']}  {sample['language']}: {text}"
            self.console.print(said, highlight=False, markup=False, soft_wrap=True)

    def _draw_samples(self, row: Mapping) -> None:
        if not self._events:
            return
        for number, sample in enumerate(row.get("samples", ()), start=1):
            text = f"{sample['prompt']}{ARROW}{sample['continuation']}"
            self._events.add_text(f"samples/{number}_{sample['language']}", text, row["step"])

    def _write(self, row: Mapping, scalars: Mapping[str, float]) -> None:
        if self._file:
            self._file.append(row)
        self._draw(scalars, row["step"])
        if self._wandb and scalars:
            self._wandb.log(scalars, row["step"])

    def _draw(self, scalars: Mapping[str, float], step: int) -> None:
        if self._events:
            self._events.add_scalars(scalars, step)


class _EventFiles:
    """TensorBoard's files, which begin by saying that what an earlier process wrote at this step or later does not
    count. For a bucket they are written on the local disk, and each flush ends one and sends it off.

    They are copies of what metrics.jsonl has: a storage that refuses them is said, once, and ends no run.
    """

    def __init__(self, folder: Place, first_step: int):
        self._folder, self._refused = folder, False
        self._scratch = tempfile.TemporaryDirectory(prefix="aurora-tensorboard-") if is_remote(folder) else None
        self._output: _Events | None = None
        with self._unless_refused():
            start = Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
            self._events().add_event(start)

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Points of curves by name."""
        with self._unless_refused():
            for name, value in scalars.items():
                self._events().writer.add_scalar(name, value, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        """A text as it is: TensorBoard reads Markdown, in which indented lines are left alone."""
        as_it_is = "\n".join(f"    {line}" for line in text.splitlines())
        with self._unless_refused():
            self._events().add_event(Event(wall_time=time.time(), step=step, summary=text_pb(name, as_it_is)))

    def flush(self) -> None:
        """To a bucket; files on a disk are written as they come."""
        if self._scratch is None:
            return
        with self._unless_refused():
            self._end_file()
            for file in sorted(Path(self._scratch.name).iterdir()):
                (self._folder / file.name).write_bytes(file.read_bytes())
                file.unlink()

    def close(self) -> None:
        """Writes the rest."""
        self.flush()
        with self._unless_refused():
            self._end_file()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _events(self) -> "_Events":
        if self._output is None:
            self._output = _Events(self._scratch.name if self._scratch else str(self._folder))
        return self._output

    def _end_file(self) -> None:
        if self._output is not None and not self._refused:
            output, self._output = self._output, None
            output.writer.close()

    @contextlib.contextmanager
    def _unless_refused(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorFlow's, Google's and the system's have no class in common
            if not self._refused:
                print(f"{self._folder} could not be written: {error}; metrics.jsonl has the same", flush=True)
            self._refused = True


class _Events(DirectoryOutput):
    """One file of events."""

    def __init__(self, path: str):
        super().__init__(path)
        self.writer = Writer(self)

    def add_event(self, event: Event) -> None:
        """Any event, as it is."""
        self._ev_writer.add_event(event)


def _curves_of(row: Mapping) -> dict[str, float]:
    """Curves of an evaluation by name: quick ones of another number of windows are others. An earlier version did not
    say how many. Other rows have none."""
    if "evaluation" not in row:
        return {}
    read = (
        "bits_per_byte"
        if row["complete"]
        else f"bits_per_byte_of_{row.get('settings', {}).get('windows', 'first')}_windows"
    )
    return {f"{read}/{task}": score["bits_per_byte"] for task, score in row["evaluation"].items()}


def drop_from(path: Place, first_step: int) -> list[dict]:
    """Keeps the rows of the steps before `first_step`, and the evaluations up to it with their samples; returns them.
    A run from step 0 starts a new file."""
    if not line_log.is_there(path):
        return []
    rows = read_metrics(path) if first_step else []
    evaluated = {row["step"] for row in rows if row.get("complete")}
    kept = [row for row in rows if row["step"] + ("loss" in row or "left_out" in row) <= first_step]
    kept = [row for row in kept if "samples" not in row or row["step"] in evaluated]
    line_log.rewrite(path, kept)
    return kept
