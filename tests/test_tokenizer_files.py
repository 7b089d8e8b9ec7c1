"""Which of a folder's files are its tokenizer, and what tells tokenizers apart: one digest for folders,
stores and checkpoints."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from conftest import SENTENCES
from stores import write_store

from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.checkpoints.writing import save_checkpoint
from aurora_jax.data.text.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    tokenizer_from,
    tokenizer_of,
)
from aurora_jax.data.text.tokenizer_files import read_tokenizer_files, require_tokenizer_of_stores, tokenizer_sha256
from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig
from aurora_jax.model.decoder import initial_parameters

transformers = pytest.importorskip("transformers")

TEXTS = [*SENTENCES.values(), "", " ", "  two  spaces\n\n\ttab 12345 don't", "<|endoftext|>", "🙂 ﷺ ا"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """A SentencePiece model with a name of its own."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(SENTENCES.values()) * 4),
        model_writer=content,
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "mine.model"
    path.write_bytes(content.getvalue())
    return path


@pytest.fixture(scope="module")
def gpt2(mini_tokenizer, tmp_path_factory) -> Path:
    """vocab.json and merges.txt alone."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = json.loads((mini_tokenizer / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


ADDED = {
    "nothing more": {},
    "added_tokens.json": {
        "added_tokens.json": {"<new>": 400, "[ä]": 401},
        "special_tokens_map.json": {
            "additional_special_tokens": ["<fim_prefix>", "<new>"],
            "eos_token": "<|endoftext|>",
        },
    },
    "tokenizer_config.json": {
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "added_tokens_decoder": {
                "400": {"content": "<new>", "special": True, "normalized": False},
                "1": {"content": "<fim_prefix>", "special": True, "lstrip": True},
            },
            "pad_token": "<pad>",
        },
        "added_tokens.json": {"not read": 9},
    },
    "a space before": {"tokenizer_config.json": {"add_prefix_space": True}},
    "windows": {"merges.txt": None},
}


@pytest.mark.parametrize("case", ADDED)
def test_vocab_and_merges_are_read_as_transformers_reads_them(gpt2, tmp_path, case):
    shutil.copytree(gpt2, tmp_path, dirs_exist_ok=True)
    for name, values in ADDED[case].items():
        (tmp_path / name).write_text(json.dumps(values)) if values else None
    if case == "windows":
        (tmp_path / "merges.txt").write_bytes((gpt2 / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    theirs = transformers.GPT2Tokenizer.from_pretrained(gpt2 if case == "windows" else tmp_path)
    ours = tokenizer_from(tmp_path)
    assert ours.eos_id == theirs.convert_tokens_to_ids("<|endoftext|>")
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False)
    for name in theirs.get_added_vocab():
        assert ours.encode_with_special_tokens(name)[-1] == theirs.convert_tokens_to_ids(name), name


def test_every_kind_has_one_digest(mini_tokenizer, model_file, gpt2, tmp_path):
    """A folder, its files as a checkpoint carries them, and the tokenizer that records itself in stores."""
    shutil.copytree(mini_tokenizer, tmp_path / "both")
    shutil.copy(model_file, tmp_path / "both" / "tokenizer.model")
    shutil.copytree(gpt2, tmp_path / "both", dirs_exist_ok=True)
    (tmp_path / "llama").mkdir()
    shutil.copy(model_file, tmp_path / "llama" / "tokenizer.model")
    shutil.copy(mini_tokenizer / "tokenizer.json", tmp_path / "mine.json")
    # One of our checkpoints, for `data build --tokenizer CHECKPOINT`.
    config = ModelConfig(400, 8, 4, 1, 1, 4)
    carried = {**read_tokenizer_files(mini_tokenizer), "LICENSE": b"", "tokenizer.model": model_file.read_bytes()}
    save_checkpoint(
        tmp_path / "checkpoint", initial_parameters(config, 0), CheckpointMetadata(config, "float32"), carried
    )
    expected = {
        mini_tokenizer: HuggingFaceTokenizer(mini_tokenizer),
        mini_tokenizer / "tokenizer.json": HuggingFaceTokenizer(mini_tokenizer),
        tmp_path / "mine.json": HuggingFaceTokenizer(mini_tokenizer),
        tmp_path / "both": HuggingFaceTokenizer(mini_tokenizer),  # as `transformers` decides it
        tmp_path / "both" / "tokenizer.model": SentencePieceTokenizer(model_file),
        tmp_path / "llama": SentencePieceTokenizer(model_file),
        model_file: SentencePieceTokenizer(model_file),
        gpt2: tokenizer_from(gpt2),
        tmp_path / "checkpoint": HuggingFaceTokenizer(mini_tokenizer),
        Path("bytes"): ByteTokenizer(),
    }
    for path, tokenizer in expected.items():
        files = read_tokenizer_files(path)
        assert tokenizer_sha256(files, path) == tokenizer.sha256, path
        assert tokenizer_from(path) == tokenizer, path
        assert tokenizer_of(files, path).encode(SENTENCES["fi"]) == tokenizer.encode(SENTENCES["fi"]), path
        assert type(tokenizer_of(files, path)) is type(tokenizer)
    assert len({tokenizer.sha256 for tokenizer in expected.values()}) == 4


def test_the_named_file_is_what_is_carried(mini_tokenizer, model_file, tmp_path):
    """Not another one of its folder; and what stands beside it only where the name says that it belongs there."""
    shutil.copytree(mini_tokenizer, tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer.json").write_text("another")
    (tmp_path / "folder" / "LICENSE").write_text("of the model")
    mine = (mini_tokenizer / "tokenizer.json").read_bytes()
    (tmp_path / "folder" / "mine.json").write_bytes(mine)
    shutil.copy(model_file, tmp_path / "folder" / "mine.model")
    assert read_tokenizer_files(tmp_path / "folder" / "mine.json") == {"tokenizer.json": mine}
    assert read_tokenizer_files(tmp_path / "folder" / "mine.model") == {"tokenizer.model": model_file.read_bytes()}
    shutil.copy(model_file, tmp_path / "folder" / "tokenizer.model")
    beside = read_tokenizer_files(tmp_path / "folder" / "tokenizer.model")
    assert "tokenizer.json" not in beside
    assert "tokenizer_config.json" in beside
    assert {*read_tokenizer_files(tmp_path / "folder")} >= {"tokenizer.json", "tokenizer.model", "mine.model"}
    assert "LICENSE" not in read_tokenizer_files(tmp_path / "folder")


def test_bytes_are_carried_as_the_tokenizer_of_transformers_that_they_are(tmp_path):
    for name, content in read_tokenizer_files("bytes").items():
        (tmp_path / name).write_bytes(content)
    theirs, ours = transformers.ByT5Tokenizer.from_pretrained(tmp_path), tokenizer_from(tmp_path)
    assert isinstance(ours, ByteTokenizer)
    for text in SENTENCES.values():
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_the_digest_of_vocab_and_merges_is_of_what_they_say(gpt2, tmp_path):
    """Written otherwise they are the same; with another merge, or another token added, they are not."""
    files = read_tokenizer_files(gpt2)
    digest = tokenizer_sha256(files, gpt2)
    rewritten = json.dumps(dict(reversed(json.loads(files["vocab.json"]).items())), indent=1).encode()
    unchanged = {**files, "vocab.json": rewritten, "merges.txt": files["merges.txt"].replace(b"\n", b"\r\n")}
    assert tokenizer_sha256(unchanged, gpt2) == digest
    fewer = {**files, "merges.txt": b"\n".join(files["merges.txt"].splitlines()[:-1])}
    added = {**files, "added_tokens.json": b'{"<new>": 400}'}
    prefixed = {**files, "tokenizer_config.json": b'{"add_prefix_space": true}'}
    assert len({digest, *(tokenizer_sha256(each, gpt2) for each in (fewer, added, prefixed))}) == 4


ONE_TOKEN = {"vocab.json": '{"a": 0}', "merges.txt": ""}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no tokenizer: tokenizer.json"),
        ({"vocab.json": "{}"}, "no tokenizer: tokenizer.json"),
        ({"vocab.json": "{", "merges.txt": ""}, "vocab.json: not JSON"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "vocab.json: tokens and their ids"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"}, "merges.txt: 'a b c' is not two tokens"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "do not belong together"),
        (
            {
                "vocab.json": '{"a": 0}',
                "merges.txt": "",
                "tokenizer_config.json": '{"tokenizer_class": "CodeGenTokenizer"}',
            },
            "CodeGenTokenizer",
        ),
        ({**ONE_TOKEN, "added_tokens.json": '{"<x>": 7}'}, "'<x>' is said to be 7, but is 1"),
        ({**ONE_TOKEN, "added_tokens.json": '{"<x>": "seven"}'}, "added tokens of the tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        tokenizer_from(tmp_path)


def test_stores_of_another_tokenizer_are_refused(tmp_path):
    write_store(tmp_path / "fi", [[1, 2, 0]], tokenizer_sha256="b" * 64)
    directories = {"fi": str(tmp_path / "fi"), "en": str(tmp_path / "not built")}
    require_tokenizer_of_stores("b" * 64, "here", directories)
    with pytest.raises(
        InputError, match="store of fi was made with the tokenizer bbbbbbbbbbbb, but here is cccccccccccc"
    ):
        require_tokenizer_of_stores("c" * 64, "here", directories)
