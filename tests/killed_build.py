"""Stores of two small recipes, in many small pieces. As a script: a build of them that kills itself after so
many calls of a function."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from aurora_jax.data.batches import store
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.build import pipeline as build
from aurora_jax.data.build.stores import build_stores
from aurora_jax.data.text import readers
from aurora_jax.data.text.documents import FillInTheMiddle, Instruction
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.data.text.sources import Source
from aurora_jax.data.text.tokenizer import Tokenizer, tokenizer_from

SIZES = (
    (readers, "PART_BYTES", 2000),
    (store, "SHARD_ELEMENTS", 2048),
    (store, "CHUNK_ELEMENTS", 128),
    (build, "CHUNK_TOKENS", 300),
)


def recipes(corpus: Path | str, tokenizer: Tokenizer) -> list[Recipe]:
    """Text to be filled in, and conversations of which the responses are learnt."""
    text = Source(
        {"train": (f"{corpus}/[!c]*.jsonl", f"{corpus}/code.jsonl")}, "jsonl", fields={"language": "language"}
    )
    chat = Source({"train": (f"{corpus}/chat.jsonl",)}, "jsonl", text=None, fields={"messages": "messages"})
    learn = Instruction(conversation="messages", learn="response")
    return [
        Recipe("text", "train", text, (FillInTheMiddle(),), tokenizer, append_eos=True),
        Recipe("chat", "train", chat, (learn,), tokenizer, append_eos=True),
    ]


def built(corpus: Path | str, output: Path | str, tokenizer: Tokenizer) -> dict[str, TokenStore]:
    return build_stores(recipes(corpus, tokenizer), output, max_bad_fraction=0.05)


if __name__ == "__main__":
    corpus, output, tokenizer, function, last = sys.argv[1:]
    for module, name, size in SIZES:
        setattr(module, name, size)
    original, calls = getattr(build, function), 0

    def counted(*arguments: Any) -> Any:
        global calls
        result = original(*arguments)
        calls += 1
        if calls == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(build, function, counted)
    built(corpus, output, tokenizer_from(tokenizer))
