"""Run by test_build.py: builds a store of many small parts, chunks and shards. Arguments: source, tokenizer,
output, workers."""

import sys

from aurora_jax.data.batches import store
from aurora_jax.data.build import pipeline as build
from aurora_jax.data.build.stores import build_stores
from aurora_jax.data.text import readers
from aurora_jax.data.text.documents import FillInTheMiddle
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.data.text.sources import Source
from aurora_jax.data.text.tokenizer import tokenizer_from

if __name__ == "__main__":
    source, tokenizer, output, workers = sys.argv[1:]
    # One worker is a thread of this process and sees these; more are processes of their own with the real sizes.
    readers.PART_BYTES, build.CHUNK_TOKENS, store.SHARD_ELEMENTS, store.CHUNK_ELEMENTS = 2_000, 300, 1_000, 100
    recipe = Recipe(
        "small", "train", Source({"train": (source,)}, "jsonl"), (FillInTheMiddle(),), tokenizer_from(tokenizer), True
    )
    print("ready", flush=True)
    build_stores([recipe], output, workers=int(workers), max_bad_fraction=0.1)
    print("done", flush=True)
