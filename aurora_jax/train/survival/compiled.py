"""Compiled programs are kept in the run's folder: a start after a preemption does not compile for minutes again."""

import jax

from aurora_jax.storage.places import Place, absolute_place, is_remote

FOLDER = "compiled"
LEAST_SECONDS = 0.1
"""Of compiling, for a program to be kept: a start has dozens of small ones."""
MOST_BYTES = 4 << 30
"""The programs that were not used for longest go first."""


def keep_compiled_programs(output: Place) -> None:
    """Turns JAX's persistent compilation cache on, in OUTPUT/compiled, unless the user has one elsewhere
    (JAX_COMPILATION_CACHE_DIR) or none (JAX_ENABLE_COMPILATION_CACHE=false).

    An entry is known by a digest of the program, its options and the versions; one that cannot be read is compiled for
    again. Entries are programs: a folder that somebody else made is not one to train in.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(absolute_place(output) / FOLDER))
        if not is_remote(output):  # JAX counts them under a lock, which a bucket does not have
            jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
