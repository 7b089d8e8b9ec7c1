"""Documents, and the steps that prepare them for the tokenizer.

A document is a list of pieces: text, and special tokens between them. A step takes a document and gives one
back, or raises `Rejected`.
`Prepare` (in `prepare.py`) makes SeqIO's preprocessor of a list of steps; `aurora data build` runs them
without TensorFlow.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

from aurora_jax.errors import InputError


class Piece(NamedTuple):
    """A stretch of a document: text, or the name of one special token; `learn` says whether it is to be predicted.

    Pieces of text are parts of one: tokenizers that put a space before a text put it before the first piece
    alone. `order`
    says where a piece belongs in that text, if pieces stand in another order; those of equal `order` belong
    as they stand.
    """

    text: str
    special: bool = False
    learn: bool = True
    order: int = 0


@dataclass(frozen=True)
class Document:
    """A document on its way to the tokenizer.

    Attributes:
        pieces: its text and special tokens, in order.
        fields: what else the source's record holds (`language`, `path`, `messages` ...).
        where: file and place of the record, for messages.
    """

    pieces: tuple[Piece, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def text(self) -> str:
        """The text, special tokens left out, its pieces as they stand."""
        return "".join(piece.text for piece in self.pieces if not piece.special)


class Rejected(Exception):
    """A step does not want this document; the message, a few words without the document's own, is the reason
    that is counted."""


class DocumentStep(ABC):
    """A step of preparation. Subclasses are frozen dataclasses: their fields are part of the store's fingerprint."""

    version: ClassVar[int] = 1
    """Raise it when the same document and fields give another result: stores made before are refused then."""

    cuts: ClassVar[bool] = True
    """Whether a prepared document can have several pieces of text."""

    @abstractmethod
    def __call__(self, document: Document) -> Document:
        """The document, prepared. Raises Rejected, or KeyError for a field that the source does not give."""


@dataclass(frozen=True)
class CodeFormat(DocumentStep):
    """StarCoder's code format: `<reponame>R<filename>F<gh_stars>S\\n` before the code (Li et al. 2023, arXiv
    2305.06161, section 5.1).

    Each of the three is there with its own probability, so that the model reads bare code too; what a record
    lacks or leaves empty is left out. Deterministic per document.
    """

    repository: str = "repository"
    """Field with the name of the repository."""
    path: str = "path"
    """Field with the file's path."""
    stars: str = "stars"
    """Field with the number of stars, written as StarCoder's ranges 0, 1-10, 10-100, 100-1000, 1000+."""
    rate: float = 0.2
    """Probability of each part; StarCoder's is 0.2 (memory)."""
    seed: int = 0

    def __call__(self, document: Document) -> Document:
        if not document.text.strip():  # a header would make a document of an empty file
            return document
        chance = _random(self.seed, "code format", document)
        pieces: list[Piece] = []
        for token, name in (("<reponame>", self.repository), ("<filename>", self.path), ("<gh_stars>", self.stars)):
            value = document.fields.get(name)
            if chance.random() < self.rate and value not in (None, ""):
                pieces += [
                    Piece(token, special=True),
                    Piece(_star_range(value) if token == "<gh_stars>" else str(value)),
                ]
        if not pieces:
            return document
        # One string up to the next special token, as StarCoder's tokenizer saw it.
        code = document.pieces[0] if document.pieces and not document.pieces[0].special else Piece("")
        pieces[-1] = pieces[-1]._replace(text=f"{pieces[-1].text}\n{code.text}")
        return replace(document, pieces=(*pieces, *document.pieces[1 if code.text else 0 :]))


def _star_range(stars: Any) -> str:
    count = int(stars)
    bounds = ((0, "0"), (10, "1-10"), (100, "10-100"), (1_000, "100-1000"))
    return next((name for bound, name in bounds if count <= bound), "1000+")


@dataclass(frozen=True)
class FillInTheMiddle(DocumentStep):
    """The fill-in-the-middle transform of StarCoder's training (bigcode-project/Megatron-LM, gpt_dataset.py;
    Bavarian et al. 2022).

    A document is transformed with probability `rate`: two cut points, uniform over its characters, make
    prefix, middle and suffix.

        PSM  <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
        SPM  <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle      with probability `spm_rate`

    The reference cuts the text after detokenizing it, special tokens included by their names. Here a cut
    inside such a name moves to its beginning, so that special tokens stay whole. Its random numbers follow
    the place in the stream; ours follow the document's content (`seed`), so that neither order nor number of
    workers matters.

    The reference encodes the three apart. So do byte-level tokenizers here; with others, which would put a
    space at each cut, they are encoded as pieces of one text (`Tokenizer.encode_pieces`): put back in order,
    they decode to what the document decodes to.
    """

    rate: float = 0.5
    spm_rate: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rate <= 1 and 0 <= self.spm_rate <= 1):
            raise InputError(f"fill-in-the-middle rates lie between 0 and 1, not {self.rate} and {self.spm_rate}")

    def __call__(self, document: Document) -> Document:
        chance = _random(self.seed, "fill in the middle", document)
        if chance.random() >= self.rate:
            return document
        length = sum(len(piece.text) for piece in document.pieces)
        if not length:  # the reference, too, leaves empty documents alone
            return document
        low, high = sorted((chance.randint(0, length), chance.randint(0, length)))
        prefix, rest = _cut(document.pieces, low)
        middle, suffix = _cut(rest, high - sum(len(piece.text) for piece in prefix))
        prefix, middle, suffix = (_ordered(part, order) for order, part in enumerate((prefix, middle, suffix)))
        before, middle_token, after = (Piece(f"<fim_{name}>", special=True) for name in ("prefix", "middle", "suffix"))
        if chance.random() < self.spm_rate:
            return replace(document, pieces=(before, after, *suffix, middle_token, *prefix, *middle))
        return replace(document, pieces=(before, *prefix, after, *suffix, middle_token, *middle))


def _cut(pieces: Sequence[Piece], place: int) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Pieces before and after so many characters; a special token that the place falls into goes after."""
    before: list[Piece] = []
    for index, piece in enumerate(pieces):
        if place >= len(piece.text):
            before.append(piece)
            place -= len(piece.text)
            continue
        if piece.special or place == 0:
            return tuple(before), tuple(pieces[index:])
        left, right = piece._replace(text=piece.text[:place]), piece._replace(text=piece.text[place:])
        return (*before, left), (right, *pieces[index + 1 :])
    return tuple(before), ()


def _ordered(pieces: Sequence[Piece], order: int) -> tuple[Piece, ...]:
    return tuple(piece if piece.special else piece._replace(order=order) for piece in pieces)


INSTRUCTION, RESPONSE = "### Instruction:\n", "\n### Response:\n"


@dataclass(frozen=True)
class Instruction(DocumentStep):
    """Aurora-M's template, `### Instruction:\\n{x}\\n### Response:\\n{y}`, out of two fields or out of a conversation.

    A conversation is a list of {"role", "content"} objects, or of strings that take turns; every pair of
    turns is one instruction and its response, in order; what a system message says goes before the first
    instruction.
    """

    instruction: str = "instruction"
    """Field with x."""
    response: str = "response"
    """Field with y."""
    context: str | None = None
    """Field with a further input to x (a passage to read), put below it where it is not empty."""
    conversation: str | None = None
    """Field with a whole conversation, in place of the other three."""
    learn: Literal["response", "everything"] = "everything"
    """Where the loss is: on the responses alone, or on all of it, as Aurora-M's next-token training had it."""

    def __call__(self, document: Document) -> Document:
        turns = _turns(document.fields[self.conversation]) if self.conversation else [self._pair(document.fields)]
        if not turns:
            raise Rejected("no answered instruction")
        pieces: list[Piece] = []
        for number, (x, y) in enumerate(turns):
            head = ("\n" if number else "") + INSTRUCTION + x + RESPONSE
            pieces += [Piece(head, learn=self.learn == "everything"), Piece(y)]
        return replace(document, pieces=tuple(pieces))

    def _pair(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        x, y = _said(fields[self.instruction]), _said(fields[self.response])
        context = _said(fields.get(self.context)) if self.context else ""
        if not x or not y:
            raise Rejected("no answered instruction")
        return (f"{x}\n{context}" if context else x), y


def _said(value: Any) -> str:
    """A field's text; null says nothing. Raises Rejected for lists and objects (images, calls of tools),
    which are no text."""
    if isinstance(value, list | tuple | Mapping):
        raise Rejected("an instruction or response that is no text")
    return "" if value is None else str(value).strip()


_ASKS = ("user", "human", "prompter", "question")
_ANSWERS = ("assistant", "gpt", "bot", "model", "answer")


def _turns(conversation: Sequence[Any]) -> list[tuple[str, str]]:
    """Instruction and response of every answered turn; a question without an answer ends the conversation."""
    messages: list[tuple[bool, str]] = []  # asks?, what
    system = ""
    for number, message in enumerate(conversation):
        if isinstance(message, str):
            messages.append((number % 2 == 0, message.strip()))
            continue
        role = str(message.get("role", message.get("from", ""))).lower()
        content = _said(message.get("content", message.get("value")))
        if role == "system":
            system = content
        elif role in _ASKS or role in _ANSWERS:
            messages.append((role in _ASKS, content))
        else:
            raise Rejected(f"role {role[:20]!r} in a conversation")
    turns: list[tuple[str, str]] = []
    for (asks, x), (asks_too, y) in zip(messages[::2], messages[1::2], strict=False):
        if not asks or asks_too or not x or not y:
            break
        turns.append((x, y))
    if turns and system:
        turns[0] = (f"{system}\n{turns[0][0]}", turns[0][1])
    return turns


@dataclass(frozen=True)
class MostSymbols(DocumentStep):
    """Rejects text in which digits and symbols outweigh letters, as Aurora-M's second stage did ("many
    numbers/symbols removed").

    Letters are what Unicode calls so, with combining marks (Devanagari's vowel signs); white space counts on
    neither side.
    """

    cuts = False

    share: float = 0.4
    """Largest share of characters that are neither letters nor marks. The figure is ours: Aurora-M's is not known."""

    def __call__(self, document: Document) -> Document:
        import unicodedata

        characters = [character for character in document.text if not character.isspace()]
        symbols = sum(unicodedata.category(character)[0] not in "LM" for character in characters)
        if symbols > self.share * len(characters):
            raise Rejected(f"more than {self.share:.0%} digits and symbols")
        return document


def _random(seed: int, purpose: str, document: Document) -> random.Random:
    """Random numbers that depend on the document's content alone."""
    digest = hashlib.blake2b(repr((seed, purpose)).encode(), digest_size=16)
    for piece in document.pieces:
        digest.update(piece.text.encode(errors="surrogatepass") + b"\0")
    return random.Random(digest.digest())
