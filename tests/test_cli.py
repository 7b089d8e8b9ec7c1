"""The command line: what it says, what it refuses, and that the configs which ship are runnable."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aurora_jax.cli import COMMANDS, HELP, load_config, main
from aurora_jax.errors import InputError
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.stages import learning_rate_schedule

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("[!_]*.py"))


def test_help_names_every_command(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == HELP
    assert all(f"aurora {command}" in printed for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "trian"),
        (["train"], "config file"),
        (["train", "configs/none.py"], "configs/none.py"),
        (["train", "README.md"], "README.md"),
        (["eval", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_config_without_the_function_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="config"):
        load_config(tmp_path / "empty.py")


def test_unknown_flag_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(ROOT / "configs" / "nano_aurora.py"), "--optimiser.beta1", "0.8"])
    assert stopped.value.code == 2
    assert "optimiser" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_a_valid_run(path):
    config = load_config(path)
    assert isinstance(config, TrainConfig)
    rates = jax.jit(jax.vmap(learning_rate_schedule(config.stages)))(jnp.arange(config.steps))
    assert rates.min() > 0
    assert rates.max() == pytest.approx(max(stage.learning_rate.peak for stage in config.stages if stage.learning_rate))


def test_help_does_not_import_tensorflow_or_torch():
    code = (
        "import sys; from aurora_jax.cli import main; main(['--help'])\n"
        "assert not {'tensorflow', 'torch', 'seqio', 'jax'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
