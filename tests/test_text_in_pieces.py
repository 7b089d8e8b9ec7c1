"""Every kind of tokenizer that the docs name: pieces of a text put together are the text, and new tokens are its end.

What is expected is computed apart: from the texts themselves, by bytes, and with the library's decoders where
they are right.
"""

import io
import itertools
import json
import random
from collections.abc import Callable

import pytest
import sentencepiece
from conftest import SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from transformers.convert_slow_tokenizer import bytes_to_unicode

from aurora_jax.data.text.documents import CodeFormat, Document, FillInTheMiddle, Instruction, MostSymbols, Piece
from aurora_jax.data.text.recipe import Preparation, Recipe, Tokenized
from aurora_jax.data.text.tokenizer import Tokenizer, tokenizer_from
from aurora_jax.errors import InputError
from aurora_jax.generate import prompts
from aurora_jax.generate.streaming import TextStream

FIM = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
SPECIAL = ["<unk>", "<|endoftext|>", *FIM, "<reponame>", "<filename>", "<gh_stars>", "<|käyttäjä|>"]
ADDED = ["hyvää", "päivää", "‹日本›"]
EVERY_BYTE = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(
    *, prefix: bool = False, normalizer: normalizers.Normalizer | None = None, added: list[AddedToken] | None = None
) -> str:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    if normalizer is not None:
        library.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        SENTENCES.values(), trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    library.add_tokens(added or [AddedToken(name, normalized=False) for name in ADDED])
    return library.to_str()


def spaces(normalizer, pre_tokenizer, decoder, *, unigram: bool = False, fallback: bool = True) -> str:
    """A vocabulary that writes spaces as ▁, as SentencePiece's converted ones do."""
    if unigram:
        library, trainer = (
            Library(models.Unigram()),
            trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>"),
        )
    else:
        library = Library(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
        special = [*SPECIAL, *(EVERY_BYTE if fallback else [])]
        trainer = trainers.BpeTrainer(vocab_size=700 if fallback else 300, special_tokens=special, limit_alphabet=80)
    if normalizer is not None:
        library.normalizer = normalizer
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    library.decoder = decoder
    library.train_from_iterator(SENTENCES.values(), trainer)
    definition = json.loads(library.to_str())  # trainers know tokens of a byte as special ones only
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in EVERY_BYTE]
    return json.dumps(definition)


def metaspace(scheme: str, split: bool = True, **kind) -> str:
    return spaces(None, pre_tokenizers.Metaspace("▁", scheme, split), decoders.Metaspace("▁", scheme, split), **kind)


def bytes_and_spaces(*last: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])


def sentences(**kind) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(itertools.repeat(tuple(SENTENCES.values()), 10)),
        model_writer=model,
        vocab_size=180 + 256 * kind.get("byte_fallback", False),
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        control_symbols=FIM,
        user_defined_symbols=["<mine>"],
        minloglevel=2,
        **kind,
    )
    return model.getvalue()


SPACED_T5 = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
KINDS: dict[str, Callable[[], str | bytes]] = {
    "byte-level": byte_level,
    "byte-level, space before": lambda: byte_level(prefix=True),
    "byte-level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level, greedy added tokens": lambda: byte_level(
        added=[AddedToken("<mine>", lstrip=True, rstrip=True), AddedToken("hyvää")]
    ),
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace never": lambda: metaspace("never"),
    "Metaspace always, whole": lambda: metaspace("always", split=False),
    "Metaspace, no bytes": lambda: metaspace("always", fallback=False),
    "Llama": lambda: spaces(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        bytes_and_spaces(decoders.Strip(" ", 1, 0)),
    ),
    "Gemma": lambda: spaces(normalizers.Replace(" ", "▁"), None, bytes_and_spaces()),
    "T5": lambda: spaces(
        SPACED_T5,
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]),
        decoders.Metaspace("▁", "always"),
        unigram=True,
    ),
    "SentencePiece": sentences,
    "SentencePiece, bytes": lambda: sentences(byte_fallback=True),
    "SentencePiece, no space before": lambda: sentences(byte_fallback=True, add_dummy_prefix=False),
    "SentencePiece, identity": lambda: sentences(
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, model_type="bpe"
    ),
}
LOSSLESS = ("byte-level", "Llama", "Gemma", "SentencePiece, identity")
"""Of which decode(encode(text)) is the text, if the text has no ▁."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("kinds")
    made = {"bytes": tokenizer_from("bytes")}
    for number, (kind, make) in enumerate(KINDS.items()):
        content = make()
        path = folder / f"{number}{'.model' if isinstance(content, bytes) else '.json'}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        made[kind] = tokenizer_from(path)
    return made


def some_documents(count: int) -> list[str]:
    """Stretches of five languages and code, and what is hard: spaces at the ends, unknown letters, names of tokens."""
    chance = random.Random(0)
    hard = [
        " ",
        "  ",
        "\n\n",
        "\t",
        "e\u0301",
        "ｆｕｌｌ",
        "🙂🙂",
        "語",
        "<mine>",
        "hyvää",
        "‹日本›",
        "<unk>",
        "<0x41>",
        "<|endoftext|>",
    ]
    whole = list(SENTENCES.values())
    documents = []
    for _ in range(count):
        text = "".join(
            chance.choice(whole)[(start := chance.randrange(60)) : start + chance.randrange(20)] + chance.choice(hard)
            for _ in "abc"
        )
        documents.append(chance.choice(["", " "]) + text)
    return documents


DOCUMENTS = some_documents(200)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_cut_decodes_to_the_document(kinds: dict[str, Tokenizer], kind: str) -> None:
    """The tokens of prefix, middle and suffix, made as `aurora data build` makes them and put back in order."""
    tokenizer = kinds[kind]
    prefix_id, suffix_id, middle_id = map(tokenizer.special_id, FIM)
    for spm in (0.0, 1.0):
        preparation = Preparation((FillInTheMiddle(1, spm, seed=1),), tokenizer, append_eos=False)
        for text, outcome in zip(
            DOCUMENTS, preparation.outcomes(Document((Piece(text),)) for text in DOCUMENTS), strict=True
        ):
            assert isinstance(outcome, Tokenized), outcome
            ids = outcome.ids.tolist()
            assert ids[0] == prefix_id
            suffix_place, middle_place = ids.index(suffix_id), ids.index(middle_id)
            prefix, suffix, middle = ids[1:suffix_place], ids[suffix_place + 1 : middle_place], ids[middle_place + 1 :]
            put_back = tokenizer.decode([*prefix, *middle, *suffix])
            assert put_back == tokenizer.decode(tokenizer.encode(text))
            if kind in LOSSLESS:
                assert put_back == text


@settings(max_examples=60)
@given(
    st.lists(
        st.text(alphabet="ab  \n\té日🙂e\u0301ｆ<mine>‹", max_size=8)
        | st.sampled_from(["hyvää", "<mine>", "def f(x):\n"]),
        max_size=5,
    )
)
def test_pieces_are_the_text(kinds: dict[str, Tokenizer], pieces: list[str]) -> None:
    for kind, tokenizer in kinds.items():
        encoded = tokenizer.encode_pieces(pieces)
        assert len(encoded) == len(pieces)
        text = "".join(pieces)
        assert tokenizer.decode([int(i) for ids in encoded for i in ids]) == tokenizer.decode(tokenizer.encode(text)), (
            kind
        )
        if kind in (*LOSSLESS, "bytes"):
            assert tokenizer.decode([int(i) for ids in encoded for i in ids]) == text, kind


def test_byte_level_pieces_are_encoded_apart(kinds: dict[str, Tokenizer]) -> None:
    """As the reference and the stores of before have them."""
    for kind in ("byte-level", "bytes"):
        assert kinds[kind].cuts_freely
        pieces = ["def f", "(x):", "", "\n  return "]
        apart = [ids.tolist() for ids in kinds[kind].encode_batch(pieces)]
        assert [ids.tolist() for ids in kinds[kind].encode_pieces(pieces)] == apart
    assert [kind for kind in kinds if kinds[kind].cuts_freely] == ["bytes", "byte-level"]


def test_every_step_encodes_pieces_of_one_text(kinds: dict[str, Tokenizer]) -> None:
    """Code formats and templates too: without its special tokens a document decodes to its text, no space put
    into it."""
    fields = {"repository": "a/b", "path": "c.py", "stars": 3, "instruction": "Sano hei.", "response": "Hei vain!"}
    for kind, tokenizer in kinds.items():
        if kind not in ("Llama", "Gemma", "Metaspace always", "Metaspace first", "Metaspace never"):
            continue
        for steps in ((CodeFormat(rate=1),), (Instruction(learn="response"),)):
            document = Document((Piece("def f(x):\n    return x\n"),), fields)
            (made,) = Preparation(steps, tokenizer, append_eos=False).outcomes([document])
            assert isinstance(made, Tokenized)
            prepared = document
            for step in steps:
                prepared = step(prepared)
            ids = [i for i in made.ids.tolist() if tokenizer.special_name(i) is None]
            assert tokenizer.decode(ids) == prepared.text, kind
            if made.learn is not None:
                learnt = [i for i, learn in zip(made.ids.tolist(), made.learn, strict=True) if learn]
                assert tokenizer.decode_behind(made.ids[~made.learn].tolist(), learnt) == "Hei vain!"


def test_stores_that_were_cut_otherwise_are_other_stores(kinds: dict[str, Tokenizer]) -> None:
    """Stores of what is encoded as before are still opened; the digests are those of the code of 2026-11-24,
    which wrote format 2."""

    class Reader:
        def described(self) -> tuple[str, ...]:
            return ("reader",)

    def fingerprints(tokenizer: Tokenizer, *steps) -> tuple[str, ...]:
        return Recipe("task", "train", Reader(), steps, tokenizer, True).fingerprints  # type: ignore[arg-type]

    assert BEFORE["bytes, cut"] in fingerprints(tokenizer_from("bytes"), FillInTheMiddle())
    llama = kinds["Llama"]
    llama.sha256 = "0" * 64
    assert BEFORE["zeros, whole"] in fingerprints(llama, MostSymbols())
    assert BEFORE["zeros, cut"] not in fingerprints(llama, FillInTheMiddle())


BEFORE = {
    "bytes, cut": "cb16255191b39894937748954bb2c9067141416a903ee0cba6486b8ccf6a2152",
    "zeros, whole": "7dafddc95bd7c3101855711cfb7a92b32ff17ac60c9aeaf8ccfd71a608b91567",
    "zeros, cut": "6234d1343f75c7c920bdf6d9f0d700ca0a962910d1aeb44924de0b0dff699b0b",
}


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_a_completion_is_what_its_tokens_add(kinds: dict[str, Tokenizer], kind: str) -> None:
    """decode(prompt + new) without decode(prompt), token by token as well; what was shown is never taken back."""
    tokenizer = kinds[kind]
    for number, text in enumerate(DOCUMENTS[:60]):
        ids = tokenizer.encode(text)
        # A prompt is text: it ends in a whole character.
        places = [cut for cut in range(1, len(ids)) if not tokenizer.decode(ids[:cut]).endswith("\ufffd")]
        place = places[number % len(places)]
        prompt, new = ids[:place], ids[place:]
        stream = TextStream(tokenizer, context=prompt)
        shown = ""
        for i in new:
            shown += stream.add([i])
            assert "\ufffd" not in shown
        shown += stream.rest()
        assert tokenizer.decode(prompt) + shown == tokenizer.decode(ids)
        assert shown == stream.text
        assert stream.tokens == len(new)


def test_the_first_space_of_a_completion(kinds: dict[str, Tokenizer]) -> None:
    for kind in ("Llama", "Metaspace always", "SentencePiece, bytes", "SentencePiece, identity"):
        tokenizer = kinds[kind]
        prompt = prompts.continuation(tokenizer, "All")
        _, new = (ids.tolist() for ids in tokenizer.encode_pieces(["All", " human beings"]))
        stream = TextStream(tokenizer, context=prompt.context)
        assert "".join(stream.add([i]) for i in new) + stream.rest() == " human beings"


def test_prefix_completion_and_suffix_are_the_text(kinds: dict[str, Tokenizer]) -> None:
    for kind, tokenizer in kinds.items():
        if kind not in ("byte-level", "Llama", "Gemma", "Metaspace always", "SentencePiece, identity"):
            continue
        for prefix, middle, suffix in (
            ("def f(", "x", "): return"),
            ("", "def", " f"),
            ("a", " b", ""),
            ("x = ", "1", "\n\n y"),
        ):
            made = prompts.infilling(tokenizer, prefix, suffix)
            prefix_ids, middle_ids, suffix_ids = (
                ids.tolist() for ids in tokenizer.encode_pieces([prefix, middle, suffix])
            )
            before, after, end = map(tokenizer.special_id, FIM)
            assert made.tokens == [before, *prefix_ids, after, *suffix_ids, end], (kind, prefix)
            stream = TextStream(tokenizer, context=made.context)
            assert prefix + stream.add(middle_ids) + stream.rest() + suffix == prefix + middle + suffix, (kind, prefix)


def test_new_tokens_are_those_of_the_completion(kinds: dict[str, Tokenizer]) -> None:
    for tokenizer in kinds.values():
        prompt, new = tokenizer.encode("All"), tokenizer.encode("human beings born")
        stream = TextStream(tokenizer, ["ings b"], prompt)
        stream.add(new)
        assert stream.stopped
        count = stream.tokens
        texts = [tokenizer.decode_behind(prompt, new[:length]) for length in range(len(new) + 1)]
        assert texts[count].startswith(stream.text)
        assert len(texts[count - 1]) < len(stream.text)
        none = TextStream(tokenizer, [texts[-1][0]], prompt)
        none.add(new)
        assert (none.text, none.tokens) == ("", 0)


# ---------------------------------------------------------------- Added tokens


@pytest.fixture(scope="module")
def pieces_by_bytes(kinds: dict[str, Tokenizer]) -> tuple[Tokenizer, dict[int, bytes]]:
    """A byte-level tokenizer, and the bytes of its tokens as its library names them: of added ones their own text."""
    tokenizer = kinds["byte-level"]
    library = Library.from_file(str(tokenizer.path))
    added = {i: token.content.encode() for i, token in library.get_added_tokens_decoder().items()}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = library.get_vocab(with_added_tokens=False)
    expected = {i: bytes(map(byte_of.__getitem__, name)) for name, i in vocabulary.items() if i not in added} | added
    return tokenizer, expected


@settings(max_examples=150)
@given(data=st.data())
def test_added_tokens_are_their_text_among_whatever_bytes(pieces_by_bytes, data: st.DataObject) -> None:
    tokenizer, expected = pieces_by_bytes
    names = [*ADDED, "<|käyttäjä|>"]
    added = [i for i, text in expected.items() if text.decode(errors="replace") in names]
    assert len(added) == 4
    ids = data.draw(st.lists(st.sampled_from(added) | st.sampled_from(sorted(expected)), max_size=12))
    text = b"".join(expected[i] for i in ids).decode(errors="replace")
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"".join(expected[i] for i in ids)
    stream = TextStream(tokenizer)
    assert "".join(stream.add([i]) for i in ids) + stream.rest() == text


def test_added_tokens_come_back_from_a_text(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["byte-level"]
    text = "Sano hyvää päivää ‹日本› nyt"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    library = Library.from_file(str(tokenizer.path))
    assert [name for name in map(library.id_to_token, ids) if name in ADDED] == ADDED
    assert library.decode(ids) != text  # why tokens are spelled here


@settings(max_examples=100)
@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_characters(kinds: dict[str, Tokenizer], data: list[int]) -> None:
    """Tokens of a byte are decoded as UTF-8 with U+FFFD, whole characters beside them unharmed."""
    for kind in ("Llama", "Gemma", "Metaspace never"):
        library = Library.from_file(str(kinds[kind].path))
        ids = [library.token_to_id(f"<0x{byte:02X}>") for byte in data]
        context = kinds[kind].encode("a")
        assert kinds[kind].decode_behind(context, ids) == bytes(data).decode(errors="replace")


# ---------------------------------------------------------------- Tokens that there are not


def test_a_token_that_the_tokenizer_lacks_is_named(kinds: dict[str, Tokenizer]) -> None:
    for tokenizer in kinds.values():
        for i in (tokenizer.vocab_size, tokenizer.vocab_size + 10**6, -1, 1 << 40):
            assert not tokenizer.has(i)
            for use in (
                tokenizer.decode,
                TextStream(tokenizer).add,
                lambda ids, tokenizer=tokenizer: tokenizer.token_bytes(*ids),
            ):
                with pytest.raises(InputError, match=f"no token {i}"):
                    use([i])
        assert all(map(tokenizer.has, range(tokenizer.vocab_size)))


def test_a_decoder_that_cannot_be_spelled(tmp_path) -> None:
    """Its completions are what the library's decoding adds; a text cannot be cut for it, and that is said."""
    library = Library(models.BPE(end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.BPEDecoder()
    library.train_from_iterator(
        SENTENCES.values(), trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_from(tmp_path)
    ids = tokenizer.encode("human beings are")
    for place in range(1, len(ids)):
        stream = TextStream(tokenizer, context=ids[:place])
        assert tokenizer.decode(ids[:place]) + stream.add(ids[place:]) + stream.rest() == tokenizer.decode(ids)
    with pytest.raises(InputError, match="no text can be cut"):
        tokenizer.encode_pieces(["human be", "ings"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\n\n", "\n\n"),
        (r"a\tb\r", "a\tb\r"),
        (r"\\n", "\\n"),
        (r"\x41\u65e5\U0001F642", "A日🙂"),
        ("\n", "\n"),
        ("日 $x", "日 $x"),
        (r"\\\n", "\\\n"),
    ],
)
def test_stop_strings_as_they_are_typed(written: str, meant: str) -> None:
    assert prompts.stop_string(written) == meant


@pytest.mark.parametrize(
    "written", ["\\", "a\\", r"\q", r"\x4", r"\u12", r"\ud83d", r"\U00110000", r"\0", "\\日", "", "a\udcff"]
)
def test_stop_strings_that_mean_nothing(written: str) -> None:
    with pytest.raises(InputError, match=r"stop|Character"):
        prompts.stop_string(written)


@pytest.mark.parametrize(
    "make", [prompts.continuation, prompts.instruction, lambda tokenizer, text: prompts.infilling(tokenizer, "a", text)]
)
def test_halves_of_characters_are_named(kinds: dict[str, Tokenizer], make) -> None:
    """Bytes of a command that are no UTF-8, as Python hands them over, and JSON's lone surrogates."""
    for text in ("ab\udcff", "\ud83d"):
        with pytest.raises(InputError, match="the text must be UTF-8"):
            make(kinds["Llama"], text)
