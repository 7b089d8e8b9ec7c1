"""Token stores of given documents, for tests of what reads them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aurora_jax.data.batches import store as store_format
from aurora_jax.data.batches.store import StoreInfo, TokenStore, create_arrays, finish, write_range


def write_store(
    directory: Path | str,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = 50_000,
    learn: Sequence[bool] | None = None,
    **info: object,
) -> TokenStore:
    """A complete store of documents (those without tokens vanish), shard by shard; `learn` is the mask over
    all tokens."""
    documents = [ids for ids in documents if len(ids)]
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, documents)])
    ends = np.zeros(len(tokens), bool)
    ends[np.cumsum(lengths) - 1] = True
    arrays = {"tokens": tokens, "ends": ends, "offsets": np.concatenate([[0], np.cumsum(lengths)])}
    if learn is not None:
        arrays["learn"] = np.asarray(learn)
    create_arrays(directory, vocab_size, len(tokens), len(documents), learn is not None)
    for name, values in arrays.items():
        dtype = store_format.token_type(vocab_size) if name == "tokens" else store_format.TYPES[name]
        for start in range(0, len(values), store_format.SHARD_ELEMENTS):
            write_range(directory, name, start, values[start : start + store_format.SHARD_ELEMENTS].astype(dtype))
    description = {
        "task": "t",
        "split": "train",
        "fingerprint": "f" * 64,
        "sources": "s" * 64,
        "tokenizer_sha256": "s",
        "eos_id": 0,
        "language": "en",
        "text_bytes": 10,
    } | info
    finish(
        directory,
        StoreInfo(
            vocab_size=vocab_size,
            documents=len(documents),
            tokens=len(tokens),
            masked=learn is not None,
            format=store_format.FORMAT,
            **description,  # type: ignore[arg-type]
        ),
    )
    return TokenStore.open(directory)
