"""The tokenizer of a run is that of its stores: compared with the checkpoint's before anything is built, and
carried to the export."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from conftest import SENTENCES

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.checkpoints.writing import save_checkpoint
from aurora_jax.data.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, tokenizer_from
from aurora_jax.data.text.tokenizer_files import read_tokenizer_files
from aurora_jax.errors import InputError
from aurora_jax.evaluate.eval_command import EvalCommand
from aurora_jax.generate.generate_command import GenerateCommand
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters
from aurora_jax.train.config import DataConfig, EvaluationConfig, TrainConfig
from aurora_jax.train.loop import train
from aurora_jax.train.stages import LearningRate, Stage
from aurora_jax.train.travelling import files_of_run, with_end_of
from convert.__main__ import main

MODEL = ModelConfig(vocabulary_size=400, max_positions=32, width=16, layers=1, heads=2, mlp_width=24, pad_token_id=0)
OTHERS = {
    "LICENSE": b"of the old model\n",
    "generation_config.json": b'{"eos_token_id": [0]}',
    "chat_template.jinja": b"{{ old }}",
    "tokenizer.model": b"of the old one, \xff",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def old(folder, mini_tokenizer) -> Path:
    """A checkpoint that carries the tokenizer of the miniature corpus, and more."""
    files = {**read_tokenizer_files(mini_tokenizer), **OTHERS}
    metadata = CheckpointMetadata(MODEL, "float32", tokenizer_sha256=tokenizer_from(mini_tokenizer).sha256)
    save_checkpoint(folder / "old", initial_parameters(MODEL, 0), metadata, files)
    return folder / "old"


@pytest.fixture(scope="module")
def mine(folder) -> Path:
    """Another tokenizer, of a name of its own, in a folder that has a tokenizer.json as well."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(SENTENCES.values()) * 4),
        model_writer=content,
        vocab_size=390,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / "tokenizer.json").write_text("somebody else's")
    path = folder / "tokenizers" / "mine.model"
    path.write_bytes(content.getvalue())
    return path


@pytest.fixture(scope="module")
def config(folder, old, mine, mini_corpus) -> TrainConfig:
    """A step on Finnish with `mine`, from weights that have learned the other tokenizer's ids."""
    data = DataConfig(
        corpus=str(mini_corpus), tokenizer=mine, stores=str(folder / "stores"), batch_size=8, sequence_length=32
    )
    return TrainConfig(
        output=folder / "run",
        stages=(Stage("one", "sample_fi", 1, LearningRate(peak=1e-3)),),
        data=replace(data, allow_other_tokenizer=True),
        initial_checkpoint=old,
        compute=ComputeConfig("float32", "float32"),
        evaluation=EvaluationConfig(tasks=()),
        log_format="lines",
    )


@pytest.fixture(scope="module")
def run(config) -> Path:
    train(config)
    return config.output


def both_named(one: str, other: str) -> str:
    return rf"{one[:12]}.*{other[:12]}"


def test_the_tokenizer_of_other_weights_is_refused(config, old, mine, mini_tokenizer, tmp_path):
    strict = replace(
        config,
        output=tmp_path / "run",
        data=replace(config.data, allow_other_tokenizer=False, stores=str(tmp_path / "s")),
    )
    digests = both_named(tokenizer_from(mini_tokenizer).sha256, SentencePieceTokenizer(mine).sha256)
    with pytest.raises(InputError, match=f"{old} carries the tokenizer {digests}.*--data.allow-other-tokenizer"):
        train(strict)
    assert not (tmp_path / "s").exists(), "nothing is built before it is known that it can be used"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_its_stages_and_the_export_carry_the_tokenizer_of_the_data(run, mine, tmp_path):
    for where in (run, run / "stages" / "one"):
        files, metadata = checkpoint.read_files(where), checkpoint.read_metadata(where)
        assert files == {"tokenizer.model": mine.read_bytes(), "LICENSE": OTHERS["LICENSE"]}
        assert metadata.tokenizer_sha256 == SentencePieceTokenizer(mine).sha256
        assert (metadata.config.eos_token_id, metadata.config.pad_token_id) == (
            SentencePieceTokenizer(mine).eos_id,
            None,
        )
    assert main(["to-torch", str(run / "stages" / "one"), str(tmp_path / "back")]) == 0
    names = {file.name for file in (tmp_path / "back").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "LICENSE"}
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == mine.read_bytes()
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"]
        == SentencePieceTokenizer(mine).eos_id
    )


def test_a_run_goes_on_with_its_own_tokenizer_only(run, config, mini_tokenizer, mine):
    train(replace(config, data=replace(config.data, tokenizer=None, allow_other_tokenizer=False)))
    other = replace(config.data, tokenizer=mini_tokenizer, allow_other_tokenizer=False)
    digests = both_named(SentencePieceTokenizer(mine).sha256, tokenizer_from(mini_tokenizer).sha256)
    with pytest.raises(InputError, match=f"{run}/checkpoints/1 carries the tokenizer {digests}"):
        train(replace(config, data=other))


def test_stores_of_another_tokenizer_are_refused(run, config, old, mine, mini_tokenizer, tmp_path):
    """By a run on the checkpoint's own tokenizer, to train on and held out, and by `aurora eval`; both
    digests are named."""
    digests = both_named(SentencePieceTokenizer(mine).sha256, tokenizer_from(mini_tokenizer).sha256)
    own = replace(config, output=tmp_path / "run", data=replace(config.data, tokenizer=None))
    with pytest.raises(
        InputError, match=f"sample_fi/train: the store of sample_fi was made with the tokenizer {digests}"
    ):
        train(own)
    evaluate = EvalCommand(
        run / "stages" / "one", config.data.corpus, config.data.stores, tasks=("sample_fi",), batch_size=4
    )
    evaluate.run()
    with pytest.raises(InputError, match=f"sample_fi/validation: .*{digests}"):
        replace(evaluate, checkpoint=old).run()
    held_out = EvaluationConfig(tasks=("sample_fi",))
    with pytest.raises(InputError, match=f"sample_fi/validation: .*{digests}"):
        train(replace(own, stages=(replace(config.stages[0], mixture="sample_en"),), evaluation=held_out))


def test_generate_reads_the_carried_tokenizer_and_refuses_another(run, old, mine, mini_tokenizer, capsys):
    GenerateCommand(run / "stages" / "one", "Kaikki", max_new_tokens=2).run()
    assert capsys.readouterr().out
    digests = both_named(tokenizer_from(mini_tokenizer).sha256, SentencePieceTokenizer(mine).sha256)
    command = GenerateCommand(old, "Kaikki", max_new_tokens=2, tokenizer=mine)
    with pytest.raises(InputError, match=f"{old} carries the tokenizer {digests}"):
        command.run()
    replace(command, allow_other_tokenizer=True).run()


def test_what_is_carried_is_decided_by_the_files(mini_tokenizer, mine, old, tmp_path):
    """The checkpoint's files where the tokenizer is the same; the data's, and no licence of theirs, where
    there is no other."""
    data = DataConfig(corpus="", tokenizer=mini_tokenizer)
    carried = checkpoint.read_files(old)
    assert files_of_run(data, old, carried).contents == carried
    assert files_of_run(replace(data, tokenizer=None), old, carried).contents == carried
    for name, content in {**read_tokenizer_files(mini_tokenizer), "README.md": b"", "mine.model": b""}.items():
        (tmp_path / name).write_bytes(content)
    from_data = files_of_run(replace(data, tokenizer=tmp_path), None, {}).contents
    assert from_data == {**read_tokenizer_files(mini_tokenizer), "mine.model": b""}
    without = files_of_run(
        replace(data, tokenizer=mine), old, {"LICENSE": b"", "merges.txt": b"alone it is no tokenizer"}
    )
    assert without.contents == {"LICENSE": b"", "tokenizer.model": mine.read_bytes()}
    assert isinstance(files_of_run(replace(data, tokenizer=Path("bytes")), None, {}).tokenizer, ByteTokenizer)
    for checkpoint_path in (old, None):
        with pytest.raises(InputError, match=r"no tokenizer.*give --data\.tokenizer"):
            files_of_run(replace(data, tokenizer=None), checkpoint_path, {"LICENSE": b""})


def test_bytes_do_not_carry_what_lies_in_the_working_directory(mini_tokenizer, monkeypatch):
    monkeypatch.chdir(mini_tokenizer)
    files = files_of_run(DataConfig(corpus="", tokenizer=Path("bytes")), None, {}).contents
    assert {*files} == {"tokenizer_config.json"}
    assert "tokenizer_class" in json.loads(files["tokenizer_config.json"])


def test_the_end_of_text_of_the_data_is_compared_with_the_models(mini_tokenizer, capsys):
    tokenizer = tokenizer_from(mini_tokenizer)  # ends documents with 0
    for same in (MODEL, replace(MODEL, eos_token_id=(5, 0))):
        assert with_end_of(tokenizer, same, "there", new=False) is same
    assert not capsys.readouterr().out
    other = replace(MODEL, eos_token_id=2)
    assert with_end_of(tokenizer, other, "there", new=False) is other
    assert "documents of the data end with the token 0; there has eos_token_id 2" in capsys.readouterr().out
    changed = with_end_of(tokenizer, other, "there", new=True)
    assert (changed.eos_token_id, changed.bos_token_id, changed.pad_token_id) == (0, None, None)
    assert "the run's checkpoints say 0" in capsys.readouterr().out
