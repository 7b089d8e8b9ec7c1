"""The training program, in chapters. `train(config)` runs it from wherever the run stands to its end."""

import secrets
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.checkpoints import format as checkpoint_format
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.checkpoints.metadata import CheckpointMetadata, require_same_architecture
from aurora_jax.checkpoints.run_folder import remove_leftovers
from aurora_jax.checkpoints.writing import require_plain
from aurora_jax.data.batches.loader import Batch, DataStage, Loader, stage_over
from aurora_jax.data.batches.mixture import left_out
from aurora_jax.data.batches.store import TokenStore, store_directory
from aurora_jax.data.build.opening import open_stores
from aurora_jax.data.text.tokenizer_files import require_tokenizer_of_stores
from aurora_jax.errors import InputError
from aurora_jax.evaluate.bits_per_byte import Evaluator
from aurora_jax.generate.end_of_text import end_of_text_ids
from aurora_jax.model.config import ModelConfig
from aurora_jax.model.mesh import make_mesh, place, rows_of_this_process
from aurora_jax.model.sharding import parameter_shardings
from aurora_jax.storage.places import Place, absolute_place, require_writable
from aurora_jax.train.checkpoint import RunCheckpoints, choose_start, require_no_earlier_run
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.facts import LEFT_OUT, run_facts
from aurora_jax.train.judged import judged_on
from aurora_jax.train.metrics import MetricsLog
from aurora_jax.train.processes import is_first, of_first, require_shared, stop_requested, wait_for_all
from aurora_jax.train.profile import StepTrace
from aurora_jax.train.program import Program
from aurora_jax.train.samples import Sampler
from aurora_jax.train.state import TrainState
from aurora_jax.train.survival.compiled import keep_compiled_programs
from aurora_jax.train.survival.diagnosis import places_of, write_diagnosis
from aurora_jax.train.survival.goodput import Goodput, slow_host
from aurora_jax.train.survival.rollback import roll_back
from aurora_jax.train.survival.twins import require_twins
from aurora_jax.train.survival.watchdog import Watchdog
from aurora_jax.train.throughput import Throughput
from aurora_jax.train.travelling import RunFiles, files_of_run, with_end_of
from aurora_jax.train.wandb_run import import_wandb

SAID_OF_SKIPPED = ("loss", "gradient_norm", "learning_rate")


class Diverged(FloatingPointError):
    """Loss or gradient stayed non-finite, or kept spiking; the newest checkpoint is from before."""


def train(config: TrainConfig) -> TrainState:
    """Trains until the stage table is done, `stop_after` steps are, or a SIGTERM or Ctrl-C arrives (a
    checkpoint is written first).

    Returns:
        The last state.

    Raises:
        InputError: something in the config, the data or a checkpoint is wrong; nothing has been overwritten.
        Diverged: `optimizer.most_skipped` updates in a row were skipped.
    """
    if config.wandb_project:
        import_wandb()
    require_plain(config.output)
    require_writable(config.output)
    require_shared(config.output)
    keep_compiled_programs(config.output)
    goodput = Goodput(config.output)

    # ---------------------------------------------------------------- Start: own run, given checkpoint, random weights
    left_out_steps = roll_back(config)
    start = choose_start(config)
    model, files, metadata = _describe_start(config, start.path)
    print(f"start: {start.kind}" + (f" from {start.path}" if start.path else " weights"), flush=True)

    # ---------------------------------------------------------------- Mesh, and whether it can do what is asked
    mesh = make_mesh(config.mesh)
    program = Program(config, model, mesh)
    program.check()
    print(
        f"mesh: {dict(mesh.shape)}; attention: {config.compute.attention}; products: {config.compute.compute_dtype}",
        flush=True,
    )

    # ---------------------------------------------------------------- Data
    stages, stores, held_out = _open_data(config, files)
    _check_vocabulary(model, {**held_out, **stores})
    loader = Loader(
        stores,
        stages,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        attend_across_documents=config.data.attend_across_documents,
    )
    fingerprints = {task: store.info.fingerprint for task, store in stores.items()}

    rows = rows_of_this_process(mesh, config.data.batch_size)
    program = replace(program, tasks=len(loader.tasks))

    # ---------------------------------------------------------------- State
    metadata = replace(metadata, data_fingerprints={**metadata.data_fingerprints, **fingerprints})
    facts = {**run_facts(config, stages, stores, held_out), LEFT_OUT: left_out_steps}
    eos_ids = end_of_text_ids(metadata, files.contents, files.tokenizer)
    sampler = Sampler(config.evaluation, model, config.compute, mesh, files.tokenizer, eos_ids)
    if start.kind != "resume":
        require_no_earlier_run(config.output, facts)
    run = f"{of_first(secrets.randbits(31)):08x}"
    checkpoints = RunCheckpoints(config, metadata, files.contents, facts, run)
    if start.kind == "resume":
        assert start.path is not None
        state = checkpoints.restore(program.shapes, int(start.path.name))
    elif start.path is not None:
        shardings = parameter_shardings(model, mesh)
        parameters = restore_parameters(start.path, dtype=jnp.float32, shardings=shardings)
        state = program.state_around(parameters)
    else:
        state = program.random_state()
    first_step = int(jax.device_get(state.step))
    wait_for_all("folder found to be this run's")
    if is_first():
        if removed := remove_leftovers(config.output):
            names = ", ".join(str(path.relative_to(absolute_place(config.output))) for path in removed[:3])
            print(f"removed {len(removed)} leftovers of saves that were cut off: {names}", flush=True)
        checkpoints.describe()
    wait_for_all("leftovers removed")

    # ---------------------------------------------------------------- Evaluation
    evaluator = Evaluator(
        program.likelihood,
        held_out,
        files.tokenizer,
        batch_size=config.evaluation.batch_size,
        sequence_length=config.data.sequence_length,
    )
    ends, quick = config.ends, config.evaluation.quick_windows
    last_step = min(config.steps, config.stop_after or config.steps)
    throughput = Throughput.of(
        model,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        chips=mesh.size,
        device_kind=mesh.devices.flat[0].device_kind,
    )

    # ---------------------------------------------------------------- Train loop
    with (
        jax.set_mesh(mesh),
        MetricsLog(config, throughput, first_step=first_step) as log,
        StepTrace(config.output / "profile", config.profile_steps) as step_trace,
        goodput,
        Watchdog(config.output, config.watchdog_minutes * 60) as watchdog,
        stop_requested() as stops,
        jax.transfer_guard("disallow"),
    ):

        def due(step: int) -> list[int | None]:
            """Windows of the evaluations after so many steps: quick ones also where all text is read, so that
            they make one curve."""
            whole = step in ends or step == 0
            return (
                [*([quick] if whole or step % config.evaluation.every == 0 else []), *([None] if whole else [])]
                if held_out
                else []
            )

        def evaluate(step: int, stage: str, windows: int | None) -> None:
            begun = time.monotonic()
            scores = {task: asdict(score) for task, score in evaluator(state.parameters, windows).items()}
            samples = sampler(state.parameters) if windows is None else []
            seconds = time.monotonic() - begun
            log.evaluation(step, stage, scores, evaluator.settings(windows), samples, seconds=seconds)

        goodput.begin_steps(first_step)
        # What comes after a checkpoint, a stop may have cut off.
        if first_step in ends:
            checkpoints.save_stage(state, ends[first_step])
        for windows in due(first_step):
            if not of_first((first_step, windows is None) in log.evaluated):
                with goodput.lost("evaluation"), watchdog.slow("the evaluation before the first step"):
                    evaluate(first_step, loader.position(first_step - 1)["stage"] if first_step else "start", windows)

        skipped: list[dict[str, Any]] = []  # in a row, in this start

        def record(step: int, stage: str, metrics: dict) -> None:
            with goodput.on_devices():
                values = jax.device_get(metrics)
            values = _record(log, loader, step, stage, values)
            goodput.step(step + 1, counted=bool(values["accepted"]))
            watchdog.feed(f"step {step + 1}")
            if values["accepted"]:
                skipped.clear()
                return
            skipped.append({"step": step, "stage": stage, **{name: values[name] for name in SAID_OF_SKIPPED}})
            log.console.print(
                f"step {step}: update skipped (loss {values['loss']}, gradient norm {values['gradient_norm']}); its "
                "texts are in metrics.jsonl"
            )
            if (in_a_row := int(values["skipped_in_a_row"])) >= config.optimizer.most_skipped:
                first = step - in_a_row + 1
                path = write_diagnosis(config.output, loader, (first, step), skipped, state)
                raise Diverged(
                    f"The updates of steps {first} to {step} were all skipped: loss {values['loss']}, "
                    f"gradient norm {values['gradient_norm']}; the batches, norms and rates are in {path}. Lower the "
                    "learning rate, or give --rollback 1 (or more) to go on from a checkpoint before them without "
                    "these batches."
                )

        dispatched: tuple[int, str, dict] | None = None
        batches = loader.prefetched(first_step, last_step, depth=config.data.prefetch, rows=rows)
        for step, batch in goodput.waiting(batches):
            stage = loader.position(step)["stage"]
            if passed_over := any(first <= step <= last for first, last in left_out_steps):
                if dispatched is not None:
                    record(*dispatched)
                    dispatched = None
                state = program.pass_over(state)
                log.left_out(step, stage)
                goodput.step(step + 1, counted=False)
            else:
                with step_trace.before(step):
                    state, metrics = program.step(state, place(mesh, batch, rows, config.data.batch_size))
                step_trace.after(step, metrics)
            # Metrics are read one step late: the devices are busy with this step while the host looks at the
            # one before.
            if dispatched is not None:
                record(*dispatched)
                if dispatched[0] == first_step:
                    log.restart_clock()
            dispatched = None if passed_over else (step, stage, metrics)

            done = step + 1
            stopping = stops(step)
            saves = done in ends or done == last_step or stopping or done % config.checkpoint.every == 0
            saves = saves or checkpoints.due(done)
            evaluations = [] if stopping else due(done)
            if config.compare_devices_every and done % config.compare_devices_every == 0:
                with goodput.lost("evaluation"), watchdog.slow("the comparison of devices"):
                    rows_of = partial(_some_rows, loader, step)
                    require_twins(program.likelihood, state.parameters, rows_of, config.evaluation.batch_size, done)
            if dispatched is not None and (saves or evaluations):
                record(*dispatched)
                dispatched = None
            with goodput.lost("checkpoints"), watchdog.slow(f"the checkpoint of step {done}"):
                if saves:
                    log.flush()
                    checkpoints.save(state, stage)
                if done in ends:
                    checkpoints.save_stage(state, stage)
            with goodput.lost("evaluation"), watchdog.slow(f"the evaluation after step {done}"):
                for windows in evaluations:
                    evaluate(done, stage, windows)
            if saves or evaluations:
                hosts = goodput.host_seconds()
                log.goodput(done, stage, goodput.seconds(), loader.position(step)["epochs"], hosts)
                if sentence := slow_host(hosts, goodput.step_seconds()):
                    log.console.print(sentence, highlight=False)
            if stopping:
                log.console.print(f"stopped after step {done}; the same command continues from there", highlight=False)
                break

        # -------------------------------------------------------------- The end
        if int(jax.device_get(state.step)) > first_step:
            with goodput.lost("checkpoints"), watchdog.slow("the last checkpoint"):
                checkpoints.finish(state, stage)
        log.console.print(goodput.sentence(), highlight=False)
    checkpoints.close()
    return state


def _some_rows(loader: Loader, step: int, numbers: np.ndarray) -> Batch:
    """Of a step's batch, counted on where it has fewer."""
    return loader.batch(step, numbers % loader.batch_size)


def _describe_start(config: TrainConfig, path: Place | None) -> tuple[ModelConfig, RunFiles, CheckpointMetadata]:
    """Model, files and metadata that the run's checkpoints will carry."""
    if path is None:
        assert config.model is not None  # TrainConfig checks it
        files = files_of_run(config.data, None, {})
        model = with_end_of(files.tokenizer, config.model, "the config's model", new=True)
        source, sha256 = {"random_seed": config.seed}, files.tokenizer.sha256
        return model, files, CheckpointMetadata(model, "float32", tokenizer_sha256=sha256, source=source)
    found = checkpoint_format.read_metadata(path)
    if config.model is not None:
        require_same_architecture(found.config, config.model, path, "this run's config")
    files = files_of_run(config.data, path, checkpoint_format.read_files(path))
    model = with_end_of(files.tokenizer, found.config, path, new=files.replaced)
    sha256 = files.tokenizer.sha256
    return model, files, replace(found, config=model, tokenizer_sha256=sha256, parameter_dtype="float32", step=0)


def _open_data(
    config: TrainConfig, files: RunFiles
) -> tuple[list[DataStage], dict[str, TokenStore], dict[str, TokenStore]]:
    """The stage table with its rates, the training stores and the held-out stores: all made with the run's
    tokenizer."""
    # SeqIO brings TensorFlow, which takes seconds to import: only those who train pay for it.
    from aurora_jax.data.registry.tasks import mixture_rates, register
    from aurora_jax.data.registry.vocabulary import Vocabulary

    registry = register(config.data.corpus, Vocabulary(files.tokenizer), config.data.modules)
    rates = {stage.mixture: mixture_rates(stage.mixture) for stage in config.stages}
    tasks = dict.fromkeys(task for mixture in rates.values() for task, _ in mixture)
    judged = judged_on(config.evaluation, tasks, registry.splits)
    for split, its_tasks in (("train", tasks), ("validation", judged)):
        directories = {task: store_directory(config.data.stores, task, split) for task in its_tasks}
        require_tokenizer_of_stores(files.tokenizer.sha256, files.tokenizer_from, directories)
    recipes = [registry.recipe(task, "train") for task in tasks]
    stores = open_stores(recipes, config.data.stores, skip_missing=config.data.skip_missing)
    recipes = [registry.recipe(task, "validation") for task in dict.fromkeys(judged)]
    held_out = open_stores(recipes, config.data.stores)
    for store in (*stores.values(), *held_out.values()):  # those that were built just now
        require_tokenizer_of_stores(files.tokenizer.sha256, files.tokenizer_from, {store.info.task: store.directory})
    for mixture, its_rates in rates.items():
        if absent := left_out(mixture, its_rates, stores):
            print(absent, flush=True)
    stages = [stage_over(stores, stage.name, rates[stage.mixture], stage.steps) for stage in config.stages]
    return stages, stores, held_out


def _check_vocabulary(model: ModelConfig, stores: dict[str, TokenStore]) -> None:
    for task, store in stores.items():
        if store.info.vocab_size > model.vocabulary_size:
            raise InputError(
                f"The store of {task} was made with a tokenizer of {store.info.vocab_size} entries; the model has "
                f"{model.vocabulary_size}: this is another model's tokenizer."
            )


def _record(log: MetricsLog, loader: Loader, step: int, stage: str, values: dict) -> dict[str, float]:
    tasks = loader.tasks
    nll, tokens = values.pop("task_nll"), values.pop("task_tokens")
    task_loss = {task: float(nll[i] / tokens[i]) for i, task in enumerate(tasks) if tokens[i] > 0}
    scalars = {name: float(value) for name, value in values.items()}
    texts = () if scalars["accepted"] else places_of(loader, step)
    log.step(step, stage, scalars, task_loss, texts)
    return scalars
