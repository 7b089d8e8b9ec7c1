"""The trained tokenizer against `transformers`, and its layout against StarCoder's own tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from aurora_jax.errors import InputError
from aurora_jax.sample_corpus.tokenizer_training import (
    SPECIAL_TOKENS,
    TrainTokenizerCommand,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "def total(values):\n    return sum(value for value in values if value > 0)\n",
    "The document was saved before the window was closed, and 1234 lines were printed.",
    "Tämä asiakirja tallennettiin ennen kuin ikkuna suljettiin.",
    "विंडो बंद होने से पहले दस्तावेज़ सहेजा गया था।",
    "ウィンドウを閉じる前に文書を保存しました。",
    "Tài liệu đã được lưu trước khi cửa sổ được đóng lại.",
]
SIZE = 400
STARCODER = Path(os.environ.get("AURORA_SHARED", "/work/shared")) / "data" / "starcoder-tokenizer" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, SIZE)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "out"
    save_tokenizer(tokenizer, out)
    return out


def test_transformers_loads_the_same_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == loaded.vocab_size == SIZE
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 0, 0)
    assert loaded.convert_ids_to_tokens(list(range(19))) == list(SPECIAL_TOKENS)
    for text in [*TEXTS, "a  b , c . d ' s\n\n\t", "x<fim_prefix>y<|endoftext|>"]:
        assert loaded.encode(text) == tokenizer.encode(text).ids
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.decode(loaded.encode("x<|endoftext|>"), skip_special_tokens=True) == "x"


@settings(deadline=None, derandomize=True)
@given(st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = ByteLevel.alphabet()
    assert len(alphabet) == 256
    ids = [tokenizer.token_to_id(symbol) for symbol in alphabet]
    assert sorted(ids) == list(range(19, 19 + 256))


def test_digits_stand_alone_and_words_have_no_invented_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    assert not tokenizer.encode("The").tokens[0].startswith("Ġ")


def test_equal_texts_give_equal_tokenizers(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), SIZE).to_str() == tokenizer.to_str()


@pytest.mark.skipif(not STARCODER.exists(), reason="StarCoder's tokenizer is not here")
def test_the_layout_is_starcoders(tokenizer: Tokenizer) -> None:
    ours, theirs = json.loads(tokenizer.to_str()), json.loads(STARCODER.read_text(encoding="utf-8"))
    assert ours["added_tokens"] == theirs["added_tokens"]
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    assert ours["normalizer"] == theirs["normalizer"]
    starcoder = Tokenizer.from_file(str(STARCODER))
    for text in [*TEXTS, "x = 42  # 007\n\n\n    if y:\t'it's' we'll"]:
        assert tokenizer.pre_tokenizer.pre_tokenize_str(text) == starcoder.pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.parametrize(("size", "reason"), [(274, "cannot hold"), (100_000, "gave only")])
def test_a_size_that_cannot_be_had_is_an_error(size: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        train_tokenizer(TEXTS, size)


def test_the_command_needs_a_corpus_and_a_free_destination(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data sample"):
        TrainTokenizerCommand(tmp_path, tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="exists already"):
        TrainTokenizerCommand(tmp_path, tmp_path).run()
