"""Tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from aurora_jax.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no whole character (yet)."""


class TextStream:
    """The text of one completion.

    Args:
        stop: strings that end it; the text is cut before the first of them.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._shown = 0
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, tokens: Sequence[int]) -> str:
        """Takes new tokens; returns the new text that can be shown: what may be the beginning of a stop string is held back."""
        self._tokens += tokens
        text = self._text()
        end = len(text)
        if not self.stopped:
            end -= _held_back(text, self._stop)
        shown, self._shown = text[self._shown : end], max(self._shown, end)
        return shown

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._decoded()
        shown, self._shown = text[self._shown :], max(self._shown, len(text))
        return shown

    @property
    def text(self) -> str:
        """All of it, up to the stop string."""
        return self._decoded()

    def _text(self) -> str:
        text = self._decoded()
        return text if self.stopped else text.rstrip(UNFINISHED)

    def _decoded(self) -> str:
        text = self._tokenizer.decode(self._tokens)
        places = [place for place in map(text.find, self._stop) if place >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of a text that are the beginning of a stop string."""
    return max((length for word in stop for length in range(1, len(word)) if text.endswith(word[:length])), default=0)
