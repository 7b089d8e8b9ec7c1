"""Was a store made of the files that its sources hold now?"""

import hashlib
import json
from collections.abc import Sequence

from aurora_jax.data.text.recipe import Recipe
from aurora_jax.errors import InputError
from aurora_jax.storage.files import File
from aurora_jax.storage.kvstore import kvstore_at


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
