"""Where a completion ends: at the tokens at which `transformers` ends it, however many the model's files
name, and an export names them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.data.text.tokenizer import tokenizer_from
from aurora_jax.errors import InputError
from aurora_jax.generate.end_of_text import end_of_text_ids
from aurora_jax.generate.generate_command import GenerateCommand
from aurora_jax.model.config import ModelConfig
from convert.__main__ import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPT = "All human beings are born"
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def folder(mini_tokenizer, tmp_path_factory) -> Path:
    """A GPTBigCode with random weights, with the tokenizer of the miniature corpus."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    torch.manual_seed(3)
    sizes = {"vocab_size": 400, "n_positions": 128, "n_embd": 24, "n_layer": 2, "n_head": 3, "initializer_range": 0.6}
    transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(**sizes, eos_token_id=0, bos_token_id=0)
    ).save_pretrained(folder)
    shutil.copytree(mini_tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def free(folder) -> list[int]:
    """What the model says when nothing ends it."""
    return of_transformers(folder, eos_token_id=None)


def of_transformers(folder: Path, **settings) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([tokenizer_from(folder).encode(PROMPT)])
    with torch.inference_mode():
        made = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **settings)
    return made[0, tokens.shape[1] :].tolist()


def with_files(folder: Path, path: Path, config: object, generation: dict | None) -> Path:
    """A copy of the folder whose config.json names these ends of text, and whose generation_config.json is this."""
    shutil.copytree(folder, path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "eos_token_id": config}))
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_bytes(json.dumps(generation).encode() + b"\r\n")
    return path


def places(free: list[int]) -> tuple[int, int]:
    """Two tokens of the text, the first of which comes late and the second later."""
    first = next(token for token in free[5:] if free.index(token) >= 5)
    return first, next(token for token in free[free.index(first) + 1 :] if free.index(token) > free.index(first))


CASES = {
    "a list in generation_config.json": lambda one, two: (0, {"eos_token_id": [two, one]}),
    "an id in generation_config.json": lambda one, two: (one, {"eos_token_id": two}),
    "a list in config.json": lambda one, two: ([two, one], None),
    "a list of one in config.json": lambda one, two: ([two], None),
    "generation_config.json comes first": lambda one, two: ([one], {"eos_token_id": [two, 399]}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_ends_where_transformers_ends_it(folder, free, tmp_path, case):
    config, generation = CASES[case](*places(free))
    hf = with_files(folder, tmp_path / "hf", config, generation)
    expected = of_transformers(hf)
    assert 5 < len(expected) < NEW_TOKENS
    assert main(["from-torch", str(hf), str(tmp_path / "ours")]) == 0
    metadata, files = checkpoint.read_metadata(tmp_path / "ours"), checkpoint.read_files(tmp_path / "ours")
    ids = end_of_text_ids(metadata, files, tokenizer_from(folder))
    assert next(place for place, token in enumerate(free) if token in ids) + 1 == len(expected)
    assert main(["to-torch", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == config
    assert of_transformers(tmp_path / "back") == expected
    if generation is not None:
        assert (tmp_path / "back" / "generation_config.json").read_bytes() == (
            hf / "generation_config.json"
        ).read_bytes()


def test_generate_stops_at_any_of_them(folder, free, tmp_path):
    one, two = places(free)
    hf = with_files(folder, tmp_path / "hf", 0, {"eos_token_id": [two, one]})
    assert main(["from-torch", str(hf), str(tmp_path / "ours"), "--dtype", "float32"]) == 0
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    GenerateCommand(
        tmp_path / "ours",
        input=tmp_path / "prompts.jsonl",
        output=tmp_path / "out.jsonl",
        max_new_tokens=NEW_TOKENS,
        batch_size=1,
    ).run()
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert record["finish_reason"] == "eos"
    expected = of_transformers(hf)
    assert expected[-1] == one
    assert record["completion"] == tokenizer_from(folder).decode(expected[:-1])


def test_what_was_trained_here_ends_with_its_documents_too(folder):
    """And so does a model whose files name no end at all."""
    tokenizer = tokenizer_from(folder)
    metadata = CheckpointMetadata(ModelConfig(400, 8, 4, 1, 1, 4, eos_token_id=7), "float32")
    assert end_of_text_ids(metadata, {}, tokenizer) == (7,)
    assert end_of_text_ids(replace(metadata, data_fingerprints={"fi": "abc"}), {}, tokenizer) == (0, 7)
    assert end_of_text_ids(metadata, {"generation_config.json": b"{}"}, tokenizer) == (0,)
    silent = replace(metadata, config=replace(metadata.config, eos_token_id=None))
    assert end_of_text_ids(silent, {}, tokenizer) == (0,)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
        (b"\xff", "not JSON"),
    ],
)
def test_a_malformed_generation_config_is_named(folder, content, said):
    metadata = CheckpointMetadata(ModelConfig(400, 8, 4, 1, 1, 4), "float32")
    with pytest.raises(InputError, match=f"there: generation_config.json.*{said}"):
        end_of_text_ids(metadata, {"generation_config.json": content}, tokenizer_from(folder), "there")


def test_several_ends_of_text_are_kept_by_the_metadata():
    metadata = CheckpointMetadata(ModelConfig(400, 8, 4, 1, 1, 4, eos_token_id=(7, 0)), "float32")
    read = CheckpointMetadata.from_json(json.loads(json.dumps(metadata.to_json())))
    assert read == metadata
    assert read.config.eos_token_ids == (7, 0)
    hash(read.config)  # a config is a static argument of jit
