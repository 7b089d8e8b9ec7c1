"""The command line: `aurora` or `python -m aurora_jax`."""

import importlib
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

from aurora_jax import environment
from aurora_jax.errors import BAD_INPUT, CHIP_FAULT, DIVERGED, ChipFault, InputError

HELP = """usage: aurora COMMAND ...

Continual pretraining of StarCoder-family models: PyTorch weights in, Flax on a mesh, PyTorch weights out.

  aurora data sample DIR            a real corpus in English, Finnish, Hindi, Japanese, Vietnamese and code, from packages
  aurora data tokenizer CORPUS OUT  a byte-level BPE tokenizer in StarCoder's layout
  aurora data curate OUT NAME=FILES filters, redacts, deduplicates and decontaminates documents, and reports what went and why
  aurora data describe MIXTURE      its tasks, rates, licences, files, stores, and epochs over a planned run
  aurora data build MIXTURE ...     token stores out of the sources of SeqIO mixtures, with Apache Beam
  aurora data show MIXTURE          one row of a batch, decoded, as the model reads it
  aurora train CONFIG.py            trains what a config file describes, or continues where it stopped
  aurora plan CONFIG.py             does it fit a TPU pod, how fast can it go, what does it cost; needs no TPU
  aurora eval CHECKPOINT            bits per byte of held-out text, language by language
  aurora generate CHECKPOINT PROMPT text from a checkpoint: continues, fills gaps in code, answers instructions
  aurora report RUN                 report.html: what a run has learnt and what it has kept
  aurora checkpoints ls RUN         its checkpoints; verify, prune and lineage: are they sound, which go, where from

Weights come in and go out with `python -m convert from-torch | to-torch | verify`.
Each command explains itself with --help."""


def load_config(path: Path) -> Any:
    """The value of `config()` in a Python file. Raises InputError if there is no such file or function."""
    if not path.is_file():
        there = ", ".join(sorted(str(config) for config in Path("configs").glob("[!_]*.py")))
        raise InputError(f"{path}: no such config file{f'; there are {there}' if there else ''}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: a config is a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise InputError(f"{path}: a config file must have a function `config()` that returns a TrainConfig.")
    return module.config()


TRAIN_HELP = """usage: aurora train CONFIG.py [--field value ...]

Trains what a config file describes. The same command again continues the run from its newest checkpoint.
`aurora train CONFIG.py --help` lists every field, with its meaning and the config's value.

Exit status: 0 when the run is done, 2 for input that you can mend, 5 when it has diverged (diagnosis.json says how;
--rollback goes on without the batches), 6 when a chip miscalculates, 75 when nothing has happened for long, 143 when SIGTERM stopped it, with a checkpoint, before its end."""
STOPPED = 143
"""A shell's status of SIGTERM: what supervises a run (launch_tpu.sh, Kubernetes, Slurm) must not take it for done."""


def _train(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        from aurora_jax.train.processes import HELP as PROCESSES_HELP

        print(f"{TRAIN_HELP}\n\n{PROCESSES_HELP}")
        if arguments and arguments[0] in ("-h", "--help"):
            return
        raise InputError("aurora train needs a config file first, such as configs/nano_aurora.py.")
    from aurora_jax.train import processes
    from aurora_jax.train.config import TrainConfig
    from aurora_jax.train.loop import train

    config = load_config(Path(arguments[0]))
    config = tyro.cli(TrainConfig, default=config, args=list(arguments[1:]), prog=f"aurora train {arguments[0]}")
    processes.join()
    if int(train(config).step) < min(config.steps, config.stop_after or config.steps):
        raise SystemExit(STOPPED)


PLAN_HELP = """usage: aurora plan CONFIG.py [--topology v5p:4x4x4] [--slices N] [--tokens 435e9] [--price USD]
                             [--picture FILE] [--json FILE] [--search]
       aurora plan --list

Compiles the step that `aurora train CONFIG.py` runs, and its evaluation, for a TPU topology, without a TPU, and says
what they need: memory, time, collectives, cost. `aurora plan CONFIG.py --help` lists every option; the config's fields
can be changed with --config.FIELD."""


def _plan(arguments: Sequence[str]) -> None:
    from rich.console import Console

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "--list" in arguments:
        from aurora_jax.plan.plan_command import list_topologies

        return list_topologies(Console())
    if not arguments or arguments[0].startswith("-"):
        print(PLAN_HELP)
        if arguments and arguments[0] in ("-h", "--help"):
            return None
        raise InputError("aurora plan needs a config file first, such as configs/starcoderplus_v5p_128.py.")
    from aurora_jax.plan.plan_command import main

    return main(load_config(Path(arguments[0])), list(arguments[1:]), f"aurora plan {arguments[0]}")


DATA_COMMANDS = {
    "sample": "aurora_jax.sample_corpus:SampleCommand",
    "tokenizer": "aurora_jax.sample_corpus.tokenizer_training:TrainTokenizerCommand",
    "curate": "aurora_jax.data.curation.curate_command:CurateCommand",
    "describe": "aurora_jax.data.look.describe:DescribeCommand",
    "build": "aurora_jax.data.build.build_command:BuildCommand",
    "show": "aurora_jax.data.look.show:ShowCommand",
}


def _data(arguments: Sequence[str]) -> None:
    # Beam warns through the root logger of cloud libraries that are not installed.
    logging.getLogger().setLevel(logging.ERROR)
    if arguments[:1] == ["show"] and len(arguments) > 1 and arguments[1].endswith(".py"):
        return _show_of_config(Path(arguments[1]), arguments[2:])
    # Beam takes seconds to import: only the command that is wanted is imported, and all of them where none is named.
    wanted = [name for name in arguments[:1] if name in DATA_COMMANDS] or DATA_COMMANDS
    commands = {}
    for name in wanted:
        module, command = DATA_COMMANDS[name].split(":")
        commands[name] = getattr(importlib.import_module(module), command)
    if len(commands) == 1:
        return tyro.cli(commands[arguments[0]], args=list(arguments[1:]), prog=f"aurora data {arguments[0]}").run()
    return _subcommands("data", commands, arguments)


def _show_of_config(path: Path, arguments: Sequence[str]) -> None:
    """`aurora data show CONFIG.py`: the config's values are the defaults of the command's flags."""
    from aurora_jax.checkpoints import format as checkpoint
    from aurora_jax.checkpoints.run_folder import newest_step
    from aurora_jax.data.look.show import ShowCommand
    from aurora_jax.storage.carried_files import write_files

    config = load_config(path)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = config.data.tokenizer
        # As a run chooses: its own newest checkpoint, then the one that it starts from.
        checkpoints = [config.output] if newest_step(config.output) is not None else []
        checkpoints += [path for path in [config.initial_checkpoint] if path is not None and path.exists()]
        if tokenizer is None and checkpoints:
            tokenizer = Path(folder)
            write_files(checkpoint.read_files(checkpoints[0]), tokenizer)
        default = ShowCommand(
            what=str(path),
            stores=config.data.stores,
            tokenizer=tokenizer,
            seed=config.seed,
            batch_size=config.data.batch_size,
            sequence_length=config.data.sequence_length,
            attend_across_documents=config.data.attend_across_documents,
            data_root=config.data.corpus,
            modules=config.data.modules,
            skip_missing=config.data.skip_missing,
            stages=tuple((stage.name, stage.mixture, stage.steps) for stage in config.stages),
        )
        tyro.cli(ShowCommand, default=default, args=[str(path), *arguments], prog="aurora data show").run()


def _eval(arguments: Sequence[str]) -> None:
    from aurora_jax.evaluate.eval_command import EvalCommand

    tyro.cli(EvalCommand, args=list(arguments), prog="aurora eval").run(_as_checkpoint)


@contextmanager
def _as_checkpoint(path: Path) -> Iterator[Path]:
    """Itself, or what a PyTorch folder of Hugging Face's is converted to."""
    from aurora_jax.checkpoints.format import is_checkpoint

    if is_checkpoint(path) or not (path / "config.json").is_file():
        yield path
        return
    from convert.from_torch import from_torch

    with tempfile.TemporaryDirectory(prefix="aurora-eval-") as folder:
        converted = Path(folder, path.resolve().name)
        from_torch(path, converted)
        yield converted


def _generate(arguments: Sequence[str]) -> None:
    from aurora_jax.generate.generate_command import GenerateCommand

    tyro.cli(GenerateCommand, args=list(arguments), prog="aurora generate").run()


def _report(arguments: Sequence[str]) -> None:
    from aurora_jax.evaluate.report import ReportCommand

    tyro.cli(ReportCommand, args=list(arguments), prog="aurora report").run()


def _checkpoints(arguments: Sequence[str]) -> None:
    from aurora_jax.checkpoints.commands import COMMANDS as commands

    if command := commands.get("".join(arguments[:1])):
        return tyro.cli(command, args=list(arguments[1:]), prog=f"aurora checkpoints {arguments[0]}").run()
    return _subcommands("checkpoints", commands, arguments)


def _subcommands(name: str, commands: dict[str, Any], arguments: Sequence[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(commands, args=list(arguments), prog=f"aurora {name}").run()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "data": _data,
    "train": _train,
    "plan": _plan,
    "eval": _eval,
    "generate": _generate,
    "report": _report,
    "checkpoints": _checkpoints,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for input that the user can mend)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    environment.prepare()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: there is no command {arguments[0]!r}\n\n{HELP}", file=sys.stderr)
        return 2
    try:
        COMMANDS[arguments[0]](arguments[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except ChipFault as error:
        print(f"error: {error}", file=sys.stderr)
        return CHIP_FAULT
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read (`head`, a pager) has seen enough. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
