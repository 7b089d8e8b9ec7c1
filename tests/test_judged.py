"""What a run is judged on is said by the run, and `aurora eval` takes it from there."""

from dataclasses import replace
from pathlib import Path

import pytest

from aurora_jax.cli import load_config, main
from aurora_jax.data.registry.tasks import register
from aurora_jax.data.registry.vocabulary import vocabulary_from
from aurora_jax.errors import InputError
from aurora_jax.train.config import DataConfig, EvaluationConfig, TrainConfig
from aurora_jax.train.judged import judged_on
from aurora_jax.train.loop import train
from convert.__main__ import main as convert

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def registered(tmp_path):
    return register(tmp_path, vocabulary_from("bytes"))


def test_a_run_that_does_not_say_it_is_told_which_of_its_tasks_have_a_held_out_part(registered):
    trained = ["aurora_web_fi", "sample_fi", "aurora_pile", "aurora_stack_python"]
    with pytest.raises(InputError, match=r"--evaluation\.tasks sample_fi aurora_pile or .*nothing behind it\."):
        judged_on(EvaluationConfig(), trained, registered.splits)
    with pytest.raises(InputError, match=r"--evaluation\.tasks TASK \.\.\. or .*No task of its mixtures has one"):
        judged_on(EvaluationConfig(), ["aurora_web_fi"], registered.splits)
    assert judged_on(EvaluationConfig(tasks=("sample_ja",)), trained, registered.splits) == ("sample_ja",)


def test_a_run_that_is_judged_on_nothing_says_so(capsys):
    assert judged_on(EvaluationConfig(tasks=()), [], {}.get) == ()
    assert "not judged on any text" in capsys.readouterr().out


def test_such_a_run_does_not_begin(mini_corpus, mini_tokenizer, tmp_path):
    config = load_config(ROOT / "configs" / "nano_base.py")
    data = DataConfig(str(mini_corpus), mini_tokenizer, stores=str(tmp_path / "stores"), sequence_length=256)
    with pytest.raises(InputError, match=r"--evaluation\.tasks sample_code sample_en"):
        train(replace(config, output=tmp_path / "run", data=data, evaluation=EvaluationConfig()))
    assert not (tmp_path / "stores").exists()
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py")))
def test_every_config_says_it(name):
    config: TrainConfig = load_config(ROOT / "configs" / f"{name}.py")
    assert config.evaluation.tasks
    assert bool(config.evaluation.keep) == (config.initial_checkpoint is not None)


def test_what_is_to_be_kept_is_measured():
    with pytest.raises(InputError, match=r"evaluation\.keep names sample_ja, which"):
        EvaluationConfig(tasks=("sample_en",), keep=("sample_en", "sample_ja"))


def test_eval_of_a_checkpoint_that_no_run_has_written_asks_for_tasks(tmp_path, capsys):
    assert convert(["from-torch", str(ROOT / "examples" / "nano"), str(tmp_path / "nano")]) == 0
    assert main(["eval", str(tmp_path / "nano"), "--corpus", str(tmp_path)]) == 2
    assert "--tasks sample_en sample_code" in " ".join(capsys.readouterr().err.split())
