"""Tokens to text while they come: whole characters only, and nothing of a stop string."""

import bisect
from collections.abc import Sequence

from aurora_jax.data.text.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no whole character (yet)."""


class TextStream:
    """The text of one completion: what its tokens add to the text that they continue.

    Args:
        stop: strings that end it; the text is cut before the first of them.
        context: tokens of the text that is continued, such as the prompt; none if the completion begins a text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._context = list(context)
        self._tokens: list[int] = []
        self._shown = 0
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, tokens: Sequence[int]) -> str:
        """Takes new tokens; returns the new text that can be shown: what may be the beginning of a stop
        string is held back."""
        self._tokens += tokens
        text = self.text
        end = len(text)
        if not self.stopped:
            whole = text.rstrip(UNFINISHED)
            end = len(whole) - _held_back(whole, self._stop)
        shown, self._shown = text[self._shown : end], max(self._shown, end)
        return shown

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        text = self.text
        shown, self._shown = text[self._shown :], max(self._shown, len(text))
        return shown

    @property
    def text(self) -> str:
        """All of it, up to the stop string."""
        text = self._of(len(self._tokens))
        places = [place for place in map(text.find, self._stop) if place >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    @property
    def tokens(self) -> int:
        """Tokens that the text is made of: all, or, before a stop string, the fewest that hold it (one cut in
        two counts)."""
        text = self.text
        if not self.stopped:
            return len(self._tokens)
        return bisect.bisect_left(range(len(self._tokens)), True, key=lambda count: self._of(count).startswith(text))

    def _of(self, count: int) -> str:
        return self._tokenizer.decode_behind(self._context, self._tokens[:count])


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of a text that are the beginning of a stop string."""
    return max((length for word in stop for length in range(1, len(word)) if text.endswith(word[:length])), default=0)
