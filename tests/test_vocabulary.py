"""Vocabularies: round trips, token 0, and agreement with `transformers` and SentencePiece themselves."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_jax.data.registry.vocabulary import Vocabulary, vocabulary_from
from aurora_jax.data.text.tokenizer import ByteTokenizer, tokenizer_from
from aurora_jax.errors import InputError

SHARED = Path(os.environ.get("AURORA_SHARED", Path(__file__).parents[2] / "shared"))
STARCODER = SHARED / "data" / "starcoder-tokenizer" / "tokenizer.json"

TEXTS = {
    "en": "All human beings are born free and equal in dignity and rights.\n",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.\n",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\n",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。\n",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.\n",
    "code": "def add(a: int, b: int) -> int:\n\t# tabs,  double  spaces and\r\nline ends\n    return a + b  # 10_000\n",
}
TRAP = "one<|endoftext|>two <fim_prefix>three"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A byte-level BPE in StarCoder's layout; saved with the truncation of whoever made it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<fim_prefix>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    tokenizer.enable_truncation(8)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return vocabulary_from(folder)


@pytest.fixture(scope="module")
def starcoder() -> Vocabulary:
    if not STARCODER.is_file():
        pytest.skip(f"StarCoder's tokenizer is not at {STARCODER}; set AURORA_SHARED")
    return vocabulary_from(STARCODER)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("".join(TEXTS.values()) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spm"),
        vocab_size=400,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        control_symbols=["<fim_prefix>", "<fim_middle>"],
        user_defined_symbols=["<mine>"],
        minloglevel=2,
    )
    return folder / "spm.model"


@pytest.mark.parametrize("language", TEXTS)
def test_starcoder_round_trip(starcoder: Vocabulary, language: str) -> None:
    text = TEXTS[language]
    assert starcoder.decode(starcoder.encode(text)) == text
    (batched,) = starcoder.encode_batch([text])
    assert batched.tolist() == starcoder.encode(text)
    assert starcoder.encode_tf(tf.constant(text)).numpy().tolist() == starcoder.encode(text)


def test_starcoder_layout(starcoder: Vocabulary) -> None:
    assert (starcoder.eos_id, starcoder.vocab_size, starcoder.unk_id, starcoder.bos_id) == (0, 49_152, None, None)


def test_agrees_with_transformers(starcoder: Vocabulary) -> None:
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_file=str(STARCODER))
    for text in TEXTS.values():
        assert starcoder.encode(text) == other.encode(text)
    assert starcoder.tokenizer.encode_with_special_tokens(TRAP) == other.encode(TRAP)


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_any_text_survives(small: Vocabulary, text: str) -> None:
    ids = small.encode(text)
    assert small.eos_id not in ids
    assert small.decode(ids) == text
    assert small.encode_batch([text, "x"])[0].tolist() == ids


def test_special_tokens_in_text_are_text(small: Vocabulary) -> None:
    ids = small.encode(TRAP)
    assert not {0, 1} & set(ids)
    assert small.decode(ids) == TRAP
    assert not {0, 1} & set(small.encode_batch([TRAP])[0].tolist())
    assert not {0, 1} & set(small.encode_tf(tf.constant(TRAP)).numpy().tolist())
    assert [i for i in small.tokenizer.encode_with_special_tokens(TRAP) if i in (0, 1)] == [0, 1]


def test_token_zero_in_decoding(small: Vocabulary) -> None:
    a, b = small.encode("a"), small.encode("b")
    ids = [*a, 0, *b, 0, 0]
    assert small.decode(ids) == "a<|endoftext|>"
    assert small.decode_all(ids) == "a<|endoftext|>b<|endoftext|><|endoftext|>"
    rows = small.decode_tf(tf.constant([[*a, 0, *b], [*b, *a, 0]]))
    assert rows.numpy().tolist() == [b"a<|endoftext|>", b"ba<|endoftext|>"]


def test_saved_truncation_is_ignored(small: Vocabulary) -> None:
    assert tokenizers.Tokenizer.from_file(str(small.tokenizer.path)).truncation is not None
    assert len(small.encode(TEXTS["en"] * 10)) > 8


def test_equality_is_by_content(small: Vocabulary, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(small.tokenizer.path.read_bytes())
    assert vocabulary_from(copy) == small
    assert hash(vocabulary_from(copy)) == hash(small)
    copy.write_bytes(small.tokenizer.path.read_bytes().replace(b"<fim_prefix>", b"<fim_middle>"))
    assert vocabulary_from(copy) != small


def test_pickle(small: Vocabulary) -> None:
    other = pickle.loads(pickle.dumps(small))
    assert other == small
    assert other.encode(TRAP) == small.encode(TRAP)


def test_sentencepiece(sentencepiece_model: Path) -> None:
    import sentencepiece

    vocabulary: Vocabulary = vocabulary_from(sentencepiece_model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    texts = [text.strip() for text in TEXTS.values()] + ["<|endoftext|> </s> <pad>"]
    for text, ids in zip(texts, vocabulary.encode_batch(texts), strict=True):
        assert ids.tolist() == processor.encode(text) == list(vocabulary.encode(text))
        assert not {0, 1} & set(ids.tolist())
    assert (vocabulary.eos_id, vocabulary.vocab_size) == (1, 400)
    a, b = processor.encode("a"), processor.encode("b")
    assert vocabulary.decode([*a, 1, *b]) == "a"
    assert "b" in vocabulary.decode_all([*a, 1, *b])
    assert vocabulary.sha256 == vocabulary_from(sentencepiece_model).sha256


def test_sentencepiece_special_ids(sentencepiece_model: Path) -> None:
    """Control symbols, which no text becomes, are special; other pieces, and names that are none, are not."""
    import sentencepiece

    tokenizer = tokenizer_from(sentencepiece_model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    names = ["<fim_prefix>", "<fim_middle>", "</s>", "<pad>"]
    ids = [tokenizer.special_id(name) for name in names]
    assert ids == [processor.piece_to_id(name) for name in names]
    assert len(set(ids)) == 4
    assert not set(ids) & set(tokenizer.encode(" ".join(names)))
    assert tokenizer.special_id("</s>") == tokenizer.eos_id
    ordinary = next(piece for piece in map(processor.id_to_piece, range(10, 400)) if piece.isalpha())
    for name in ("<mine>", "<0x41>", "<unk>", ordinary, "<fim_suffix>", ""):
        with pytest.raises(InputError, match="no special token") as caught:
            tokenizer.special_id(name)
        assert str(sentencepiece_model) in str(caught.value)


def test_sentencepiece_can_be_pickled(sentencepiece_model: Path, tmp_path: Path) -> None:
    """With what is in the file, not with its path: workers need not see it."""
    copy = tmp_path / "copy.model"
    copy.write_bytes(sentencepiece_model.read_bytes())
    tokenizer = tokenizer_from(copy)
    expected = [tokenizer.encode(text) for text in TEXTS.values()]
    content = pickle.dumps(tokenizer)
    copy.unlink()
    other = pickle.loads(content)
    assert other == tokenizer
    assert [other.encode(text) for text in TEXTS.values()] == expected
    assert (other.eos_id, other.unk_id, other.vocab_size, other.path) == (1, 2, 400, copy)
    assert other.special_id("<fim_prefix>") == tokenizer.special_id("<fim_prefix>")


def test_special_ids_of_a_tokenizer_json(starcoder: Vocabulary, small: Vocabulary) -> None:
    names = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<gh_stars>"]
    assert [starcoder.tokenizer.special_id(name) for name in names] == list(range(7))
    assert starcoder.tokenizer.special_id("<reponame>") == 18
    for name in ("<fim_suffix>", "the", ""):
        with pytest.raises(InputError, match="no special token"):
            small.tokenizer.special_id(name)


@given(st.text())
def test_bytes_are_numbered_as_by_byt5(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids == seqio.ByteVocabulary().encode(text)
    assert ByteTokenizer().decode([*ids, 1]) == text


def test_byte_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no folder named "bytes" is here
    tokenizer = tokenizer_from("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (tokenizer.eos_id, tokenizer.unk_id, tokenizer.vocab_size) == (1, 2, 259)
    assert tokenizer.special_id("</s>") == seqio.ByteVocabulary().eos_id
    with pytest.raises(InputError, match="no special token '<fim_prefix>'"):
        tokenizer.special_id("<fim_prefix>")
    batch = tokenizer.encode_batch(["", "aä", TRAP])
    assert [ids.dtype for ids in batch] == [np.int32] * 3
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in ("", "aä", TRAP)]
    assert min(batch[2]) >= 3
    assert tokenizer.decode([0, 2, *batch[1], 1, 3 + 0xFF]) == "aä\ufffd"
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other == tokenizer
    assert hash(other) == hash(tokenizer)
    assert other.encode(TRAP) == tokenizer.encode(TRAP)


def test_different_kinds_are_not_equal(small: Vocabulary, sentencepiece_model: Path) -> None:
    assert len({small.tokenizer, tokenizer_from(sentencepiece_model), ByteTokenizer(), ByteTokenizer()}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not a tokenizer.json"),
        (
            '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
            "no end-of-text token",
        ),
    ],
)
def test_bad_tokenizer(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        vocabulary_from(path)
    assert str(path) in str(caught.value)


def test_bad_sentencepiece(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    with pytest.raises(InputError, match="no such"):
        vocabulary_from(path)
    path.write_bytes(b"garbage")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        vocabulary_from(path)
