"""TFRecord files and tf.train.Example, by TensorFlow, which takes seconds to import: imported where such a
file is read."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from aurora_jax.errors import InputError


def contents(path: str, url: str) -> Iterator[bytes]:
    """The records of a local file. Raises InputError, which names `url`, where a checksum is wrong."""
    try:
        yield from tf.data.TFRecordDataset(path).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise InputError(f"{url}: a damaged TFRecord file: {error.message}") from error


def example_of(content: bytes) -> dict[str, Any] | None:
    """Values by feature, a list where there is not just one; None if this is no tf.train.Example."""
    try:
        example = tf.train.Example.FromString(content)
    except DecodeError:
        return None
    found: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        found[name] = values[0] if len(values) == 1 else values
    return found
