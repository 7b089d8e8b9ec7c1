"""Document steps: against Megatron's transform and `tokenizers`' own parsing, and what they may not change."""

import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from conftest import SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from aurora_jax.data.text.documents import (
    CodeFormat,
    Document,
    DocumentStep,
    FillInTheMiddle,
    Instruction,
    MostSymbols,
    Piece,
    Rejected,
)
from aurora_jax.data.text.recipe import Dropped, Outcome, Preparation, Tokenized
from aurora_jax.data.text.sources import Bad
from aurora_jax.data.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from aurora_jax.errors import InputError

SHARED = Path(os.environ.get("AURORA_SHARED", Path(__file__).parents[2] / "shared"))
STARCODER = SHARED / "data" / "starcoder-tokenizer" / "tokenizer.json"
UNLIKELY = 1e-6  # seeds are fixed: what is less likely than this is a mistake

PREFIX, SUFFIX, MIDDLE = (Piece(f"<fim_{name}>", special=True) for name in ("prefix", "suffix", "middle"))
TEXTS = [*SENTENCES.values(), "a\r\n\tb  𝒳🇫🇮👩‍👩‍👧\0c", "one<|endoftext|>two <fim_suffix>three", "x"]


@pytest.fixture(scope="module")
def starcoder() -> HuggingFaceTokenizer:
    if not STARCODER.is_file():
        pytest.skip(f"StarCoder's tokenizer is not at {STARCODER}; set AURORA_SHARED")
    return HuggingFaceTokenizer(STARCODER)


def document(text: str, **fields: Any) -> Document:
    return Document((Piece(text),), fields, "here")


def outcome_of(tokenizer: Tokenizer, given: Document, *steps: DocumentStep) -> Outcome:
    (outcome,) = Preparation(steps, tokenizer, append_eos=True).outcomes([given])
    return outcome


def tokens_of(tokenizer: Tokenizer, given: Document, *steps: DocumentStep) -> Tokenized:
    outcome = outcome_of(tokenizer, given, *steps)
    assert isinstance(outcome, Tokenized), outcome
    return outcome


# ---------------------------------------------------------------- Fill in the middle


def characters(pieces: Sequence[Piece]) -> list[tuple[str, bool, bool]]:
    """Every character of text and every special token, with what is said of it."""
    return [
        (part, piece.special, piece.learn)
        for piece in pieces
        for part in ([piece.text] if piece.special else piece.text)
    ]


def parted(
    pieces: tuple[Piece, ...], spm: bool = False
) -> tuple[tuple[Piece, ...], tuple[Piece, ...], tuple[Piece, ...]]:
    """Prefix, middle and suffix of a transformed document; of SPM, prefix and middle in one. With no prefix,
    both look the same."""
    assert pieces[0] == PREFIX
    assert Counter(pieces)[PREFIX] == Counter(pieces)[SUFFIX] == Counter(pieces)[MIDDLE] == 1
    suffix_place, middle_place = pieces.index(SUFFIX), pieces.index(MIDDLE)
    assert suffix_place < middle_place
    before, suffix, after = pieces[1:suffix_place], pieces[suffix_place + 1 : middle_place], pieces[middle_place + 1 :]
    assert not (spm and before)
    return (after, (), suffix) if spm else (before, after, suffix)


some_pieces = st.lists(
    st.builds(Piece, st.text(max_size=8), st.just(False), st.booleans())
    | st.builds(Piece, st.sampled_from(["<reponame>", "<gh_stars>", "<jupyter_code>"]), st.just(True), st.booleans()),
    max_size=6,
).map(tuple)


@settings(max_examples=300)
@given(pieces=some_pieces, seed=st.integers(0, 2**40), spm=st.booleans())
def test_pieces_put_back_in_order_are_the_document(pieces: tuple[Piece, ...], seed: int, spm: bool) -> None:
    before = Document(pieces, {"language": "fi"}, "here")
    after = FillInTheMiddle(rate=1, spm_rate=float(spm), seed=seed)(before)
    assert (after.fields, after.where) == (before.fields, before.where)
    if not characters(pieces):
        assert after == before
        return
    prefix, middle, suffix = parted(after.pieces, spm)
    assert characters([*prefix, *middle, *suffix]) == characters(pieces)
    assert after.text == "".join(piece.text for piece in after.pieces if not piece.special)


@settings(max_examples=100)
@given(pieces=some_pieces, seed=st.integers(0, 2**40))
def test_rate_zero_changes_nothing(pieces: tuple[Piece, ...], seed: int) -> None:
    assert FillInTheMiddle(rate=0, seed=seed)(Document(pieces)) == Document(pieces)


def test_layouts_are_those_of_the_reference() -> None:
    """PSM = <fim_prefix> P <fim_suffix> S <fim_middle> M; SPM = <fim_prefix> <fim_suffix> S <fim_middle> P M."""
    text = SENTENCES["ja"]
    for seed in range(50):
        psm = FillInTheMiddle(rate=1, spm_rate=0, seed=seed)(document(text)).pieces
        p, m, s = ("".join(piece.text for piece in part) for part in parted(psm))
        assert p + m + s == text
        # The same document and seed draw the same cuts, whichever the layout.
        spm = FillInTheMiddle(rate=1, spm_rate=1, seed=seed)(document(text)).pieces
        assert "".join(piece.text for piece in psm) == f"<fim_prefix>{p}<fim_suffix>{s}<fim_middle>{m}"
        assert "".join(piece.text for piece in spm) == f"<fim_prefix><fim_suffix>{s}<fim_middle>{p}{m}"


def megatron_permute(
    contents: str, boundaries: tuple[int, int], spm: bool, tokenizer: tokenizers.Tokenizer
) -> list[int]:
    """What `permute(truncate_or_pad=False)` of bigcode-project/Megatron-LM makes of a document, its random
    choices given."""

    def tokenize(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    prefix_id, middle_id, suffix_id = 1, 2, 3
    low, high = boundaries
    prefix, middle, suffix = tokenize(contents[:low]), tokenize(contents[low:high]), tokenize(contents[high:])
    if spm:
        return [prefix_id, suffix_id, *suffix, middle_id, *prefix, *middle]
    return [prefix_id, *prefix, suffix_id, *suffix, middle_id, *middle]


@pytest.mark.parametrize("spm", [False, True])
def test_tokens_are_megatrons(starcoder: HuggingFaceTokenizer, spm: bool) -> None:
    """Whatever the document and the seed, there are two cuts of which Megatron makes the same tokens."""
    other = tokenizers.Tokenizer.from_file(str(STARCODER))
    other.encode_special_tokens = True  # names of special tokens in a text are text here; Megatron would parse them
    seen = set()
    for text in TEXTS:
        for seed in range(20):
            step = FillInTheMiddle(rate=1, spm_rate=float(spm), seed=seed)
            tokens = tokens_of(starcoder, document(text), step).ids.tolist()
            assert tokens[-1] == 0
            assert Counter(tokens)[1] == Counter(tokens)[2] == Counter(tokens)[3] == 1
            # The cuts come from what was decoded, the tokens from encoding those segments anew.
            suffix_place, middle_place = tokens.index(3), tokens.index(2)
            suffix = other.decode(tokens[suffix_place + 1 : middle_place], skip_special_tokens=False)
            high = len(text) - len(suffix)
            lows = range(high + 1) if spm else [len(other.decode(tokens[1:suffix_place], skip_special_tokens=False))]
            assert tokens[:-1] in [megatron_permute(text, (low, high), spm, other) for low in lows]
            seen.add((text, high))
    assert len(seen) > 5 * len(TEXTS)


def test_cuts_are_uniform_over_the_characters() -> None:
    """Each cut is one of the length + 1 places, both independent, as np_rng.randint(0, len(contents) + 1,
    size=2) draws them."""
    length = 4
    drawn: Counter[tuple[int, int]] = Counter()
    for number in range(6000):
        text = "".join(random.Random(number).choices("aä日𝒳", k=length))
        prefix, middle, _ = parted(FillInTheMiddle(rate=1, spm_rate=0, seed=number)(document(text)).pieces)
        low = len(characters(prefix))
        drawn[low, low + len(characters(middle))] += 1
    places = length + 1
    pairs = [(low, high) for low in range(places) for high in range(low, places)]
    expected = [6000 * (1 if low == high else 2) / places**2 for low, high in pairs]
    assert set(drawn) <= set(pairs)
    assert chisquare([drawn[pair] for pair in pairs], expected).pvalue > UNLIKELY


@pytest.mark.parametrize(("rate", "spm_rate"), [(0.5, 0.5), (0.9, 0.1), (1, 1), (1, 0)])
def test_rates_are_realised(rate: float, spm_rate: float) -> None:
    step = FillInTheMiddle(rate, spm_rate)
    transformed = psm = spm = 0
    for number in range(4000):
        pieces = step(document(f"document {number}, of some length")).pieces
        if pieces[0] != PREFIX:
            continue
        transformed += 1
        # Where both prefix and middle have something, the places of the sentinels tell the layouts apart.
        places = (pieces.index(SUFFIX), len(pieces) - pieces.index(MIDDLE))
        psm, spm = psm + (places == (2, 2)), spm + (places == (1, 3))
    assert psm + spm > 0.8 * transformed
    assert binomtest(transformed, 4000, rate).pvalue > UNLIKELY
    assert binomtest(spm, psm + spm, spm_rate).pvalue > UNLIKELY


@pytest.mark.parametrize("rates", [(-0.1, 0.5), (0.5, 1.1)])
def test_impossible_rates_are_refused(rates: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        FillInTheMiddle(*rates)


DETERMINED = """
from aurora_jax.data.text.documents import CodeFormat, Document, FillInTheMiddle, Piece
for number in {numbers}:
    made = Document((Piece(f"document {{number}} 日本語 𝒳"),), {{"repository": "a/b", "path": "c.py", "stars": number}})
    for step in (CodeFormat(rate=0.5, seed=3), FillInTheMiddle(seed=3)):
        made = step(made)
    print(number, [tuple(piece) for piece in made.pieces])
"""


def test_chance_depends_on_the_document_alone() -> None:
    """Not on the order of documents, nor on the process, its hash seed or its random state."""
    numbers = list(range(60))
    outputs = []
    for order, hash_seed in ((numbers, "1"), (numbers[::-1], "2")):
        run = subprocess.run(
            [sys.executable, "-c", DETERMINED.format(numbers=order)],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(sorted(run.stdout.splitlines()))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 60
    assert 0 < sum("fim_prefix" in line for line in outputs[0]) < 60
    assert 0 < sum("reponame" in line for line in outputs[0]) < 60


def test_seeds_and_steps_draw_apart() -> None:
    """Another seed, another choice; and a step's choice says nothing of the next one's with the same seed."""
    documents = [document(f"document {number}", repository="a/b") for number in range(2000)]
    fim = [[FillInTheMiddle(seed=seed)(one).pieces[0] == PREFIX for one in documents] for seed in (0, 1)]
    header = [CodeFormat(rate=0.5)(one).pieces[0].special for one in documents]
    for one, other in (fim, (fim[0], header)):
        assert binomtest(sum(a == b for a, b in zip(one, other, strict=True)), 2000, 0.5).pvalue > UNLIKELY


# ---------------------------------------------------------------- Code format

CODE = "def f(x):\n    return x\n"
REPOSITORY = {"repository": "octo/日本語-repo", "path": "src/äö lib.py", "stars": 57}


@pytest.mark.parametrize(
    ("stars", "written"),
    [
        (0, "0"),
        (1, "1-10"),
        (10, "1-10"),
        (11, "10-100"),
        (100, "10-100"),
        (101, "100-1000"),
        (1000, "100-1000"),
        (1001, "1000+"),
        ("7", "1-10"),
    ],
)
def test_ranges_of_stars(stars: int | str, written: str) -> None:
    after = CodeFormat(rate=1)(document(CODE, stars=stars))
    assert "".join(piece.text for piece in after.pieces) == f"<gh_stars>{written}\n{CODE}"


@pytest.mark.parametrize("missing", [(), ("stars",), ("repository", "path"), ("repository", "path", "stars")])
@pytest.mark.parametrize("empty", [None, "absent", ""])
def test_header_tokens_are_those_of_the_string(
    starcoder: HuggingFaceTokenizer, missing: tuple[str, ...], empty: str | None
) -> None:
    """`tokenizers`, parsing special tokens, reads the same tokens out of `<reponame>R<filename>F<gh_stars>S\\ncode`."""
    fields = {name: value for name, value in REPOSITORY.items() if name not in missing}
    if empty != "absent":
        fields |= dict.fromkeys(missing, empty)
    parts = {"repository": "<reponame>octo/日本語-repo", "path": "<filename>src/äö lib.py", "stars": "<gh_stars>10-100"}
    header = "".join(part for name, part in parts.items() if name not in missing)
    string = f"{header}\n{CODE}" if header else CODE
    tokens = tokens_of(starcoder, document(CODE, **fields), CodeFormat(rate=1))
    assert tokens.ids.tolist() == [*tokenizers.Tokenizer.from_file(str(STARCODER)).encode(string).ids, 0]
    assert tokens.learn is None


def test_header_parts_come_and_go_independently() -> None:
    step, count = CodeFormat(), 6000
    drawn: Counter[str] = Counter()
    for number in range(count):
        names = {piece.text for piece in step(document(f"{number}\n{CODE}", **REPOSITORY)).pieces if piece.special}
        drawn.update(names)
        drawn["two"] += {"<reponame>", "<filename>"} <= names
        drawn["all"] += len(names) == 3
    for what, rate in {"<reponame>": 0.2, "<filename>": 0.2, "<gh_stars>": 0.2, "two": 0.04, "all": 0.008}.items():
        assert binomtest(drawn[what], count, rate).pvalue > UNLIKELY, what


def test_code_with_a_header_can_be_filled_in(starcoder: HuggingFaceTokenizer) -> None:
    """Cuts leave special tokens whole, and the text is that of the header and the code."""
    for seed in range(40):
        tokens = tokens_of(
            starcoder, document(CODE, **REPOSITORY), CodeFormat(rate=1), FillInTheMiddle(rate=1, seed=seed)
        ).ids.tolist()
        counted = Counter(tokens)
        names = (
            "<|endoftext|>",
            "<fim_prefix>",
            "<fim_suffix>",
            "<fim_middle>",
            "<reponame>",
            "<filename>",
            "<gh_stars>",
        )
        assert [counted[starcoder.special_id(name)] for name in names] == [1] * 7
        text = starcoder.decode(tokens)
        for piece in (*names, CODE[-1], "octo", "ret"):
            assert piece in text


# ---------------------------------------------------------------- Instructions


def learnt(tokens: Tokenized) -> str:
    """The text of the tokens that are to be predicted, those left out as one | a stretch, EOS as $."""
    assert tokens.learn is not None
    assert len(tokens.learn) == len(tokens.ids)
    written = [
        "$" if i == 1 else chr(i - 3) if learn else "|"
        for i, learn in zip(tokens.ids.tolist(), tokens.learn, strict=True)
    ]
    return "".join(one for place, one in enumerate(written) if one != "|" or place == 0 or written[place - 1] != "|")


def template(*turns: tuple[str, str]) -> str:
    """`### Instruction:\\n{instruction}\\n### Response:\\n` as third parties prompt Aurora-M, with the response."""
    return "\n".join(f"### Instruction:\n{x}\n### Response:\n{y}" for x, y in turns)


@given(x=st.text(min_size=1).filter(str.strip), y=st.text(min_size=1).filter(str.strip))
def test_instruction_follows_the_template(x: str, y: str) -> None:
    after = Instruction()(document("", instruction=x, response=y))
    assert after.text == template((x.strip(), y.strip()))
    only = Instruction(learn="response")(document("", instruction=x, response=y))
    assert only.text == after.text
    tokens = tokens_of(ByteTokenizer(), only)
    assert tokens.learn is not None
    assert bytes((tokens.ids[tokens.learn][:-1] - 3).tolist()).decode() == y.strip()
    assert tokens.learn.tolist() == [False] * (len(tokens.ids) - len(y.strip().encode()) - 1) + [True] * (
        len(y.strip().encode()) + 1
    )


def test_everything_is_learnt_as_in_aurora_m() -> None:
    assert tokens_of(ByteTokenizer(), document("", instruction="a", response="b"), Instruction()).learn is None


TURNS = [("2 + 2?", "4"), ("And 3 + 3?", "6")]
CONVERSATIONS = {
    "roles": [
        {"role": role, "content": text}
        for turn in TURNS
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ],
    "ShareGPT": [
        {"from": role, "value": text} for turn in TURNS for role, text in zip(("human", "gpt"), turn, strict=True)
    ],
    "prompter": [
        {"role": role, "content": f" {text}\n"}
        for turn in TURNS
        for role, text in zip(("Prompter", "Assistant"), turn, strict=True)
    ],
    "strings": [text for turn in TURNS for text in turn],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(conversation: list) -> None:
    """However a dataset spells them: each pair of turns by the template; learnt are the responses and EOS."""
    step = Instruction(conversation="messages", learn="response")
    after = step(document("", messages=conversation))
    assert after.text == template(*TURNS)
    assert learnt(tokens_of(ByteTokenizer(), after)) == "|4|6$"


def test_system_message_comes_first() -> None:
    step = Instruction(conversation="messages", learn="response")
    after = step(document("", messages=[{"role": "system", "content": "Be brief."}, *CONVERSATIONS["roles"]]))
    assert after.text == template(("Be brief.\n2 + 2?", "4"), TURNS[1])
    assert learnt(tokens_of(ByteTokenizer(), after)) == "|4|6$"


def test_context_goes_below_the_instruction() -> None:
    step = Instruction(context="input")
    assert step(document("", instruction="Sum up.", input="A text.", response="ok")).text == template(
        ("Sum up.\nA text.", "ok")
    )
    for nothing in ({}, {"input": ""}, {"input": None}):
        assert step(document("", instruction="Sum up.", response="ok", **nothing)).text == template(("Sum up.", "ok"))


@pytest.mark.parametrize(
    "conversation",
    [
        [*CONVERSATIONS["roles"], {"role": "user", "content": "And 4 + 4?"}],
        [*CONVERSATIONS["roles"], {"role": "user", "content": "And 4 + 4?"}, {"role": "assistant", "content": " "}],
        [*CONVERSATIONS["roles"], {"role": "user", "content": "And 4 + 4?"}, {"role": "assistant", "content": None}],
        [
            *CONVERSATIONS["roles"],
            {"role": "user", "content": "And"},
            {"role": "user", "content": "4 + 4?"},
            {"role": "assistant", "content": "8"},
        ],
    ],
    ids=["last", "blank", "null", "twice"],
)
def test_unanswered_question_ends_a_conversation(conversation: list) -> None:
    assert Instruction(conversation="messages")(document("", messages=conversation)).text == template(*TURNS)


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "a", "response": ""},
        {"instruction": " ", "response": "b"},
        {"instruction": "a", "response": None},
        {"instruction": None, "response": "b"},
        {"messages": []},
        {"messages": ["a"]},
        {"messages": [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]},
    ],
)
def test_unanswered_instructions_are_rejected(fields: dict[str, Any]) -> None:
    step = Instruction(conversation="messages") if "messages" in fields else Instruction()
    with pytest.raises(Rejected, match="no answered instruction"):
        step(document("", **fields))
    assert outcome_of(ByteTokenizer(), document("", **fields), step) == Dropped(
        "Instruction: no answered instruction", "und"
    )


@pytest.mark.parametrize("content", [[{"type": "image", "url": "x"}], {"call": "f"}])
def test_what_is_no_text_is_rejected(content: object) -> None:
    """Python's spelling of a list is nothing to learn."""
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    for step, fields in (
        (Instruction(conversation="messages"), {"messages": messages}),
        (Instruction(), {"instruction": "a", "response": content}),
        (Instruction(context="input"), {"instruction": "a", "response": "b", "input": content}),
    ):
        with pytest.raises(Rejected, match="no text"):
            step(document("", **fields))


def test_other_roles_are_rejected_by_name() -> None:
    with pytest.raises(Rejected, match="role 'tool'"):
        Instruction(conversation="messages")(document("", messages=[{"role": "tool", "content": "x"}]))


def test_missing_field_makes_a_bad_record() -> None:
    outcome = outcome_of(ByteTokenizer(), document("text", instruction="a"), Instruction())
    assert outcome == Bad("here", "Instruction: no field 'response'", "text")


# ---------------------------------------------------------------- Numbers and symbols


@pytest.mark.parametrize("language", SENTENCES)
def test_text_is_kept(language: str) -> None:
    given = document(SENTENCES[language])
    assert MostSymbols()(given) is given


@pytest.mark.parametrize(
    "text", ["की में है से का के लिए", unicodedata.normalize("NFD", SENTENCES["vi"]), "ภาษาที่นี่", "", " \n"]
)
def test_marks_are_part_of_letters(text: str) -> None:
    given = document(text)
    assert MostSymbols()(given) is given


TABLES = {
    "csv": "\n".join(",".join(f"{x:.3f}" for x in row) for row in np.random.default_rng(0).normal(size=(20, 6))),
    "markdown": "| year | count |\n|------|-------|\n" + "\n".join(f"| {1900 + i} | {i * 977:,} |" for i in range(40)),
    "devanagari": "१२३ ४५६ ७८९ ०१२ " * 10,
    "rule": "=" * 80,
    "dates": "\n".join(f"2023-{month:02}-{day:02} 12:00:00Z 200 OK" for month in range(1, 13) for day in (1, 15)),
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_numbers_are_rejected(table: str) -> None:
    with pytest.raises(Rejected, match="more than 40% digits and symbols"):
        MostSymbols()(document(TABLES[table]))


def test_white_space_counts_on_neither_side() -> None:
    for text in ("abcdef1234", "abcdef 1234" + " \n\u3000" * 50):
        MostSymbols()(document(text))
    for text in ("abcdef12345", "abcdef 12345" + " \n\u3000" * 50):
        with pytest.raises(Rejected):
            MostSymbols()(document(text))
