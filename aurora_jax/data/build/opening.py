"""Opening the token stores of a run, checked against the recipes of its tasks."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aurora_jax.data.batches.store import TokenStore, kvstore_at, read_info, store_directory
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.errors import InputError
from aurora_jax.storage.files import File


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
            from aurora_jax.data.build.build_command import build_stores
        finally:
            logging.disable(logging.NOTSET)
        built = build_stores(missing, root, console=Console(stderr=True))
        stores |= {name.rsplit("/", 1)[0]: store for name, store in built.items()}
    if missing and not stores:
        raise InputError(f"{root}: no token store of any task; build them with `aurora data build`")
    return {recipe.task: stores[recipe.task] for recipe in recipes if recipe.task in stores}


def check_sources(recipe: Recipe, directory: str, files: Sequence[File]) -> None:
    """Are the files that can be seen those that the store was made of?

    Names and sizes must agree. Where the times of change do not, the records are read again (not tokenized)
    and their digest is compared. A pod that sees no sources has nothing to check.

    Raises:
        InputError: they are not.
    """
    if not files:
        return
    content = kvstore_at(directory).read(b"report.json").result()
    if content.state != "value":
        return
    report = json.loads(content.value)
    then, now = ([tuple(file) for file in report["files"]], [(file.name, file.size, file.modified) for file in files])
    if then == now:
        return
    if [file[:2] for file in then] == [file[:2] for file in now]:
        digests = []
        for file in files:
            for part in recipe.reader.parts(file):
                digest = hashlib.sha256()
                for _ in recipe.read(part, digest):
                    pass
                digests.append(digest.hexdigest())
        if hashlib.sha256("".join(digests).encode()).hexdigest() == report["sources"]:
            return
    raise InputError(
        f"{directory}: this token store was made of other records than its sources hold now ({len(then)} files of "
        f"{sum(file[1] for file in then):,} bytes then, {len(now)} of {sum(file[1] for file in now):,} now); "
        "choose another folder, or delete this one to build it again"
    )
