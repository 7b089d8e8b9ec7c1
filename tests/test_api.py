"""The face for people who write Python: the README's lines and every example in a docstring run, in one process, and
what they do is what the command line does."""

import doctest
import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import aurora_jax as aurora
from aurora_jax import api
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.checkpoints.writing import save_checkpoint
from aurora_jax.cli import main
from aurora_jax.data.text.tokenizer_files import read_tokenizer_files
from aurora_jax.errors import InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.model.config import ModelConfig
from aurora_jax.model.decoder import initial_parameters
from aurora_jax.storage import json_lines

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(mini_corpus, tmp_path_factory):
    """A fresh folder of a clone, in which the tests of this file run; the miniature corpus passes for the sample
    corpus."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(mini_corpus, folder / "corpus", ignore=shutil.ignore_patterns("stores"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def face(folder) -> dict[str, Any]:
    """The names that the README's lines leave behind when they have run as they stand."""
    (lines,) = re.findall(
        r"^```python\n(import aurora_jax as aurora\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    names: dict[str, Any] = {}
    exec(lines, names)
    return names


@pytest.fixture(scope="module")
def tiny(folder, mini_tokenizer) -> api.Model:
    """A random model with a tokenizer of its own."""
    config = ModelConfig(vocabulary_size=400, max_positions=64, width=16, layers=2, heads=2, mlp_width=24)
    files = read_tokenizer_files(mini_tokenizer)
    save_checkpoint("tiny", initial_parameters(config, 0), CheckpointMetadata(config, "float32"), files)
    return aurora.load("tiny")


def test_the_readmes_lines(face, folder):
    transformers = pytest.importorskip("transformers")
    assert face["before"].keys() == {"code", "en", "fi", "hi", "ja", "vi"}
    assert [row["step"] for row in face["run"].metrics if "loss" in row] == list(range(10))
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.num_parameters() == 3_353_600
    assert face["run"].curves()._repr_png_().startswith(b"\x89PNG")


def public() -> dict[str, Any]:
    """All that people call, by name."""
    found = {name: getattr(api, name) for name in ("sample_corpus", "load")}
    for each in (api.Model, api.TrainingRun):
        for name, value in vars(each).items():
            if not name.startswith("_"):
                found[f"{each.__name__}.{name}"] = getattr(value, "fget", None) or getattr(value, "func", value)
    return found


@pytest.mark.parametrize("name", public())
def test_every_example_does_what_it_says(name, face, capsys):
    function = public()[name]
    names = {"aurora": aurora, **{each: face[each] for each in ("corpus", "model", "run")}}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(function), names, name, None, None)
    assert test.examples, "public, and without an example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    assert runner.run(test, out=said.append).failed == 0, "".join(said)


def test_training_is_that_of_the_command_line(tiny, folder):
    """The same losses and figures, to the bit, out of an equal config in a file."""
    run = tiny.train("corpus", {"fi": 0.5, "en": 0.5}, steps=4, peak=1e-2, output="runs/here", batch_size=8, seed=3)
    Path("equal.pickle").write_bytes(pickle.dumps(run.config))
    Path("equal.py").write_text("import pickle\n\ndef config():\n    return pickle.load(open('equal.pickle', 'rb'))\n")
    assert main(["train", "equal.py", "--output", "runs/there"]) == 0
    for kind in ("loss", "evaluation"):
        here, there = (
            [(row["step"], row[kind]) for row in read_metrics(Path("runs", place, "metrics.jsonl")) if kind in row]
            for place in ("here", "there")
        )
        assert here == there
        assert here
    again = tiny.train(run.config)
    assert again.metrics == run.metrics, "a run that is done is not done again"


def test_figures_and_texts_are_those_of_the_command_line(tiny, capsys):
    evaluate = ["eval", "tiny", "--corpus", "corpus", "--stores", "tiny-stores", "--json", "tiny.json"]
    assert main([*evaluate, "--tasks", "sample_fi", "sample_code"]) == 0
    row = json.loads(Path("tiny.json").read_text())
    theirs = {task.removeprefix("sample_"): score["bits_per_byte"] for task, score in row["evaluation"].items()}
    assert theirs.items() <= tiny.evaluate("corpus").items()
    capsys.readouterr()
    settings = {"max_new_tokens": 9, "temperature": 0.9, "seed": 5}
    flags = ["--max-new-tokens", "9", "--temperature", "0.9", "--seed", "5"]
    assert main(["generate", "tiny", "All human", *flags]) == 0
    assert capsys.readouterr().out == tiny.generate("All human", **settings) + "\n"
    prompts = [{"prompt": "All human"}, {"instruction": "Kaikki"}, {"prompt": "a"}]
    Path("prompts.jsonl").write_bytes(b"".join(map(json_lines.line_of, prompts)))
    assert (
        main(["generate", "tiny", "--input", "prompts.jsonl", "--output", "texts.jsonl", "--batch-size", "2", *flags])
        == 0
    )
    theirs = [record["completion"] for record in json_lines.read("texts.jsonl")]
    assert tiny.generate(["All human", prompts[1], "a"], batch_size=2, **settings) == theirs


def test_two_tokenizers_are_alive_at_once(face, tiny):
    assert tiny.tokenizer.sha256 != face["model"].tokenizer.sha256
    figures = tiny.evaluate(face["corpus"])
    assert face["model"].evaluate(face["corpus"]) == face["before"] != figures
    assert tiny.evaluate(face["corpus"]) == figures


def test_a_corpus_may_be_a_folder_a_file_or_texts(tiny, folder):
    """Whatever it is, the same text has the same figures."""
    figures = tiny.evaluate("corpus")
    texts = {name: [row["text"] for row in json_lines.read(f"corpus/heldout/{name}.jsonl")] for name in figures}
    assert tiny.evaluate(folder / "corpus" / "heldout") == figures
    assert tiny.evaluate(texts) == figures
    assert tiny.evaluate("corpus/heldout/fi.jsonl") == {"fi": figures["fi"]}
    assert tiny.evaluate(iter(texts["fi"])) == {"und": figures["fi"]}


def test_texts_are_learnt_from_whole_and_measured_where_asked(tiny):
    """The texts lie in the run's folder, so that it can be gone on with; without held-out text nothing is measured."""
    texts = {"sw": ["Jina langu ni Aurora. " * 20] * 8, "et": ["Tere tulemast. " * 20] * 8}
    settings: dict[str, Any] = {"steps": 2, "peak": 1e-3, "batch_size": 4}
    alone = tiny.train(texts, output="runs/alone", **settings)
    assert {task for row in alone.metrics for task in row.get("task_loss", ())} == {"sample_sw", "sample_et"}
    assert alone.changes == []
    with pytest.raises(InputError, match="held_out="):
        alone.curves("bits_per_byte")
    measured = tiny.train(texts, {"sw": 1}, held_out="corpus/heldout/fi.jsonl", output="runs/measured", **settings)
    assert [change.language for change in measured.changes] == ["fi"]
    assert measured.model.evaluate("runs/measured/corpus").keys() == {"fi"}
    assert tiny.train("corpus", {"fi": 1}, held_out=(), output="runs/blind", **settings).changes == []


WRONG = {
    "nothing there": (lambda model: model.evaluate("nowhere"), "nowhere: no corpus. Give a folder"),
    "no held-out text": (lambda model: model.evaluate("runs/alone/corpus"), "give .*corpus/train"),
    "a language too many": (
        lambda model: model.train("corpus", {"sw": 1}, steps=1, peak=1, output="x"),
        "'sw'; the corpus has",
    ),
    "no share": (lambda model: model.train("corpus", {"fi": 0}, steps=1, peak=1, output="x"), "'fi' is 0: .* above 0"),
    "no steps": (lambda model: model.train("corpus", {"fi": 1}), "needs steps= and peak= and output="),
    "no text": (lambda model: model.evaluate({"fi": [3]}), "texts of 'fi': 3 is no string"),
    "no language": (lambda model: model.evaluate({"a b": ["text"]}), "'a b' cannot name a language"),
    "no prompt": (lambda model: model.generate(), "is expected, found nothing"),
    "two prompts": (lambda model: model.generate("a", instruct="b"), "is expected, found 'prompt', 'instruction'"),
    "too long": (lambda model: model.generate("a" * 99), "positions"),
    "no model": (lambda model: aurora.load("corpus"), "corpus: neither a checkpoint"),
    "nothing to convert": (lambda model: aurora.load("tiny", dtype="float32"), "is no Hugging Face folder"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_what_to_type(what, tiny):
    call, said = WRONG[what]
    with pytest.raises(InputError, match=said):
        call(tiny)


def test_a_config_and_keywords_are_not_mixed(tiny):
    config = tiny.train_config("corpus", {"fi": 1}, steps=1, peak=1e-3, output="runs/mixed")
    with pytest.raises(InputError, match="leave out steps"):
        tiny.train(config, steps=2)


def test_a_converted_checkpoint_can_be_kept(face, folder):
    first = aurora.load("examples/nano", checkpoint="nano-flax")
    assert first.checkpoint == folder / "nano-flax" == aurora.load("examples/nano", checkpoint="nano-flax").checkpoint
    temporary = aurora.load("examples/nano")
    where = temporary.checkpoint
    assert where.is_dir()
    del temporary
    assert not where.exists(), "it goes with the model"


def test_the_import_is_light():
    code = """
import sys, aurora_jax as aurora
assert {"load", "sample_corpus", "Model"} <= {*dir(aurora)} and not hasattr(aurora, "nothing")
assert not {"jax", "numpy", "tensorflow", "seqio", "torch", "matplotlib"} & {*sys.modules}, sys.modules.keys()
aurora.load, aurora.sample_corpus
assert "jax" in sys.modules and not {"tensorflow", "seqio", "torch", "matplotlib.pyplot"} & {*sys.modules}
assert callable(aurora.sample_corpus) and aurora.sample_corpus is sys.modules["aurora_jax.sample_corpus"]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
