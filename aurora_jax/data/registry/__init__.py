"""SeqIO and TensorFlow, behind one door."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Nothing that libraries written in C++ say on standard error is heard; exceptions are."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed already
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with _stderr_closed():  # TensorFlow 2.21 greets, whatever TF_CPP_MIN_LOG_LEVEL says
    import tensorflow  # noqa: F401
