"""How a `tokenizer.json` spells text: the bytes of each token, and the tokenizer for what goes on behind other text.

The `tokenizers` library decodes whole sequences only, and some of them wrongly: letters of added tokens are
taken for bytes (`hyvää`), every space of the first token is dropped, whole characters are lost beside a byte
that is none. Here tokens are spelled one by one.
"""

import json
import re
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_KEEPS_TEXT = ("ByteLevel", "Digits", "Split", "Punctuation", "UnicodeScripts", "FixedLength")
"""Pre-tokenizers that only divide text, unless their behaviour is to remove."""

_EDGES = ("Prepend", "Strip")
"""Normalizers that change the ends of a text."""


def _bytes_of_characters() -> dict[str, int]:
    """The characters by which byte-level vocabularies name bytes (GPT-2's table): printable ones of Latin-1
    themselves, others from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()


class Spelling:
    """The bytes of a tokenizer's tokens.

    Args:
        byte_fallback: whether the model spells unknown characters in tokens of a byte ("<0xE2>"): not every
            decoder says so.

    Attributes:
        known: whether tokens can be spelled one by one; without it only the library can decode.
        lead: what a text's first token begins with and decoding drops (the space of "▁The"); mostly "" or " ".
        cuts_freely: whether pieces of a text, each encoded for itself, decode to the text when they are put together.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, byte_fallback: bool):
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._model_names = frozenset(tokenizer.get_vocab(with_added_tokens=False)) if self._added else frozenset()
        self._replacements: list[tuple[str, str]] = []
        self._byte_level, self._byte_fallback = False, byte_fallback
        self.lead = ""
        self.known = self._read_decoder()
        self.cuts_freely = self.known and self._byte_level and self._divides_only()
        self._bytes: dict[int, bytes] = {}

    def _read_decoder(self) -> bool:
        steps = _steps(self._tokenizer.decoder)
        fused = False
        for number, step in enumerate(steps):
            match step:
                case {"type": "ByteLevel"} if number == 0:
                    self._byte_level = True
                case {"type": "Metaspace", "replacement": space, "prepend_scheme": scheme} if not fused:
                    self._replacements.append((space, " "))
                    self.lead = "" if scheme == "never" else " "
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                    self._replacements.append((old, new))
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": character, "start": start, "stop": 0} if fused:
                    self.lead = character * start
                case _:
                    return False
        return bool(steps)

    def _divides_only(self) -> bool:
        pre_tokenizers = _steps(self._tokenizer.pre_tokenizer)
        return (
            self._tokenizer.normalizer is None
            and all(step["type"] in _KEEPS_TEXT and step.get("behavior") != "Removed" for step in pre_tokenizers)
            and not any(step.get("add_prefix_space") for step in pre_tokenizers)
            and not any((token.lstrip or token.rstrip) and not token.special for token in self._added.values())
        )

    def token_bytes(self, i: int) -> bytes:
        """The bytes of a token that there is, where spelling is known; an added token's are those of its text."""
        if i not in self._bytes:
            self._bytes[i] = self._spelled(i)
        return self._bytes[i]

    def _spelled(self, i: int) -> bytes:
        name = self._tokenizer.id_to_token(i)
        assert name is not None
        # Gemma lists pieces of its model as added tokens: what the model itself makes is no text of its own.
        if i in self._added and (self._byte_level or name not in self._model_names):
            return name.encode()
        if self._byte_level and all(character in BYTE_OF for character in name):
            return bytes(BYTE_OF[character] for character in name)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(name):
            return bytes([int(name[1:-1], 16)])
        for old, new in self._replacements:
            name = name.replace(old, new)
        return name.encode()

    def is_added(self, i: int) -> bool:
        """Whether it is an added token, which decoding takes no lead from."""
        return i in self._added


def behind_other_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer without what it does at the ends of a text: no space is put before it, none of its own dropped."""
    definition = json.loads(tokenizer.to_str())
    steps = [step for step in _steps(tokenizer.normalizer) if step["type"] not in _EDGES]
    definition["normalizer"] = _sequence("normalizers", steps)
    steps = _steps(tokenizer.pre_tokenizer)
    if any(step["type"] == "Metaspace" for step in steps):
        steps = [step for step in steps if step["type"] not in ("WhitespaceSplit", "Whitespace")]
    for step in steps:
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
        if "prepend_scheme" in step:
            step["prepend_scheme"] = "never"
    definition["pre_tokenizer"] = _sequence("pretokenizers", steps)
    for token in definition["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False
    behind = tokenizers.Tokenizer.from_str(json.dumps(definition))
    behind.encode_special_tokens = tokenizer.encode_special_tokens
    return behind


def _steps(part: Any) -> list[dict[str, Any]]:
    """A decoder, normalizer or pre-tokenizer as its steps, sequences taken apart."""
    return _flat(json.loads(part.__getstate__())) if part is not None else []


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    (inner,) = (value for name, value in step.items() if name != "type")
    return [each for one in inner for each in _flat(one)]


def _sequence(name: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", name: steps} if steps else None
