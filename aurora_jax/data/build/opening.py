"""Opening the token stores of a run, checked against the recipes of its tasks."""

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aurora_jax.data.batches.store import TokenStore, read_info, store_directory
from aurora_jax.data.build.checks import check_sources
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.errors import InputError


def open_stores(recipes: Sequence[Recipe], root: str | Path, *, skip_missing: bool = False) -> dict[str, TokenStore]:
    """The stores of tasks, by task, in that order.

    One process by itself builds those that are missing, which is quick for small corpora; the processes of a
    pod do not.

    Raises:
        InputError: a store is missing, was made by another recipe, or of other records than its sources hold now.
    """
    import jax

    stores: dict[str, TokenStore] = {}
    missing = []
    for recipe in recipes:
        directory = store_directory(root, recipe.task, recipe.split)
        if read_info(directory) is None:
            missing.append(recipe)
            continue
        stores[recipe.task] = TokenStore.open(directory, *recipe.fingerprints)
        try:
            files = recipe.reader.files(recipe.split)
        except InputError:  # a pod needs no right to read the sources
            files = []
        check_sources(recipe, directory, files)
    if missing and not skip_missing:
        if jax.process_count() > 1:
            raise InputError(
                f"{root}: no complete token store of {', '.join(recipe.task for recipe in missing)} (split "
                f"{missing[0].split}); build them with `aurora data build` before the run, or leave them out with "
                "--data.skip-missing"
            )
        # Beam warns through the root logger of cloud libraries that are not installed.
        logging.disable(logging.WARNING)
        try:
            from aurora_jax.data.build.stores import build_stores
        finally:
            logging.disable(logging.NOTSET)
        built = build_stores(missing, root, console=Console(stderr=True))
        stores |= {name.rsplit("/", 1)[0]: store for name, store in built.items()}
    if missing and not stores:
        raise InputError(f"{root}: no token store of any task; build them with `aurora data build`")
    return {recipe.task: stores[recipe.task] for recipe in recipes if recipe.task in stores}
