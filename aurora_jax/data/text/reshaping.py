"""Steps that bring the records of published data sets into the form that the other steps expect."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aurora_jax.data.text.documents import Document, DocumentStep, Piece, Rejected


@dataclass(frozen=True)
class Compose(DocumentStep):
    """Puts fields, and the text as `{text}`, into a template; what a record leaves empty is empty there."""

    cuts = False

    template: str
    """Such as "{title}\\n\\n{text}"."""
    into: str | None = None
    """Field that gets the result; None: it becomes the document's text."""

    def __call__(self, document: Document) -> Document:
        values = {"text": document.text, **document.fields}
        result = self.template.format_map(
            {name: "" if value is None else value for name, value in values.items()}
        ).strip()
        if self.into is not None:
            return replace(document, fields={**document.fields, self.into: result})
        return replace(document, pieces=(Piece(result),))


@dataclass(frozen=True)
class Transcript(DocumentStep):
    """Reads a dialogue that is written as one text, with a marker before each turn, into the field `conversation`.

    What stands before the first marker becomes a system message; turns of one speaker that follow each other
    become one.
    """

    cuts = False

    ask: str
    """Marker of the one who asks, such as "<human>:"."""
    answer: str
    """Marker of the one who answers."""

    def __call__(self, document: Document) -> Document:
        parts = re.split(f"({re.escape(self.ask)}|{re.escape(self.answer)})", document.text)
        if len(parts) == 1:
            raise Rejected("no marked turn")
        conversation = [{"role": "system", "content": parts[0].strip()}] if parts[0].strip() else []
        for marker, content in zip(parts[1::2], parts[2::2], strict=True):
            role = "user" if marker == self.ask else "assistant"
            if conversation and conversation[-1]["role"] == role:
                conversation[-1]["content"] += f"\n{content.strip()}"
            else:
                conversation.append({"role": role, "content": content.strip()})
        return replace(document, fields={**document.fields, "conversation": conversation})


@dataclass(frozen=True)
class BestReplies(DocumentStep):
    """Follows a tree of messages (OpenAssistant's: `text`, `role`, `replies`, `rank`) along its best replies,
    into `conversation`."""

    cuts = False

    tree: str = "tree"
    """Field with the first message."""

    def __call__(self, document: Document) -> Document:
        conversation = []
        message: Mapping[str, Any] | None = document.fields[self.tree]
        while message:
            conversation.append({"role": message["role"], "content": message["text"]})
            message = min(message.get("replies") or (), key=_rank, default=None)
        return replace(document, fields={**document.fields, "conversation": conversation})


def _rank(message: Mapping[str, Any]) -> float:
    rank = message.get("rank")
    return float("inf") if rank is None else float(rank)


@dataclass(frozen=True)
class AtLeast(DocumentStep):
    """Rejects records whose score is lower."""

    cuts = False

    field: str
    minimum: float

    def __call__(self, document: Document) -> Document:
        if float(document.fields[self.field]) < self.minimum:
            raise Rejected(f"{self.field} below {self.minimum:g}")
        return document


@dataclass(frozen=True)
class OneOf(DocumentStep):
    """Rejects records whose field has another value."""

    cuts = False

    field: str
    values: tuple[str, ...]

    def __call__(self, document: Document) -> Document:
        if document.fields[self.field] not in self.values:
            raise Rejected(f"{self.field} is another")
        return document
