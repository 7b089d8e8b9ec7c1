"""Building the token stores of tasks, with progress."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from aurora_jax.data.batches.store import FORMAT, TokenStore
from aurora_jax.data.build import beam_runner
from aurora_jax.data.build.beam_runner import Runner
from aurora_jax.data.build.pipeline import StoreJob, begin, jobs_for, pipeline, run_here
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.errors import InputError
from aurora_jax.storage.kvstore import kvstore_at


def build_stores(
    recipes: Sequence[Recipe],
    output: str | Path,
    *,
    max_bad_fraction: float = 0.001,
    skip_missing: bool = False,
    runner: Runner = "direct",
    workers: int = 1,
    beam_options: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, TokenStore]:
    """Builds the stores that are not there yet and opens all of them.

    Args:
        recipes: what to build; see `tasks.Registry.recipe`.
        output: folder of the stores.
        max_bad_fraction: largest share of bad records of a task.
        skip_missing: leave out tasks whose files are not there.
        runner: Beam's runner.
        workers: processes of the direct runner; with 1, everything is done in this process, without Beam's runner.
        beam_options: further options of the runner.
        console: where progress goes; None for none.

    Returns:
        The stores by "task/split".

    Raises:
        InputError: sources are missing, too much of one is bad, or a store in place does not match; the other
            stores are built. Or the output cannot be written (a full disk).
    """
    jobs, complete, missing = jobs_for(recipes, output, max_bad_fraction=max_bad_fraction, skip_missing=skip_missing)
    if console and missing:
        console.print(f"[yellow]left out, for lack of files:[/yellow] {', '.join(directory for directory in missing)}")
    for job in jobs:
        begin(job.directory)
    if jobs:
        with _progress(jobs, console if runner == "direct" else None):
            if runner == "direct" and workers == 1:
                with beam_runner.errors_named():
                    run_here(jobs)
            else:
                beam_runner.run(lambda root: pipeline(root, jobs), runner, workers, beam_options)
        refused = [reason for job in jobs if (reason := _refusal(job))]
        if refused:
            raise InputError("\n".join(refused))
    directories = [*complete, *(job.directory for job in jobs)]
    stores = {"/".join(directory.split("/")[-2:]): TokenStore.open(directory) for directory in sorted(directories)}
    older = [name for name, store in stores.items() if store.info.format < FORMAT]
    if console and older:
        console.print(
            f"[yellow]of an earlier format, in which documents without a text stay:[/yellow] {', '.join(older)}; "
            "they are opened as they are, and built anew once their folders are deleted"
        )
    return stores


def _refusal(job: StoreJob) -> str:
    content = kvstore_at(job.directory).read(b"report.json").result()
    if content.state != "value":
        return f"{job.directory}: the pipeline left no report; run it again"
    return json.loads(content.value)["refused"]


@contextmanager
def _progress(jobs: Sequence[StoreJob], console: Console | None) -> Iterator[None]:
    """Shows the share of the sources' bytes whose parts are done, by the manifests in the parts' folders meanwhile."""
    if console is None:
        yield
        return
    total = sum(file.size for job in jobs for file in job.files)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"tokenize {total / 1e6:,.1f} MB of {len(jobs)} sources", total=total)

        done: dict[tuple[str, bytes], int] = {}

        def look() -> None:
            if sum(done.values()) >= total:
                return
            for job in jobs:
                folder = kvstore_at(f"{job.directory}/parts")
                for key in folder.list().result():
                    if key.endswith(b"manifest.json") and (job.directory, key) not in done:
                        content = folder.read(key).result()
                        done[job.directory, key] = (
                            json.loads(content.value)["weight"] if content.state == "value" else 0
                        )
            progress.update(bar, completed=min(sum(done.values()), total))
            if sum(done.values()) >= total:
                progress.update(bar, description="write the stores")

        with beam_runner.watched(look, 5.0 if "://" in jobs[0].directory else 0.5):
            yield
        progress.update(bar, completed=total, description="write the stores")
