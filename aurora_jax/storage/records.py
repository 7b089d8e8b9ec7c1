"""The one door by which descriptions in JSON become dataclasses: every field of its annotated type, none unknown."""

import codecs
import dataclasses
import functools
import hashlib
import json
import operator
import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

import msgspec

from aurora_jax.errors import Damaged, InputError

Description = TypeVar("Description")


def object_in(content: bytes | str, where: object) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        where: names the file in messages.

    Raises:
        InputError: it is no UTF-8, no JSON, nested too deeply, or another value.
    """
    try:
        values = json.loads(content.removeprefix(codecs.BOM_UTF8) if isinstance(content, bytes) else content)
    except RecursionError:
        raise InputError(f"{where}: not JSON: nested too deeply.") from None
    except ValueError as error:  # no UTF-8, and numbers of more digits than Python reads, too
        raise InputError(f"{where}: not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: not a JSON object.")
    return values


SHA256 = "sha256"
"""Of a description's other entries, among them."""


def json_sha256(value: Any) -> str:
    """The digest of a JSON value, however it is spelled."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, with their own digest."""
    return {**values, SHA256: json_sha256(values)}


def without_digest(values: Mapping[str, Any], where: object) -> tuple[dict[str, Any], bool]:
    """The entries without their digest, and whether they had one: versions until 2026-11-25 wrote none.

    Raises:
        Damaged: they are not what was written.
    """
    rest = {name: value for name, value in values.items() if name != SHA256}
    if SHA256 in values and values[SHA256] != json_sha256(rest):
        raise Damaged(f"{where} is not what was written: its {SHA256} differs")
    return rest, SHA256 in values


def described(content: bytes | Mapping[str, Any], kind: type[Description], where: object) -> Description:
    """What a file says, as a dataclass, nested ones included. Fields with defaults may be left out.

    Args:
        content: the file's JSON, or what it holds.
        where: names the file in messages.

    Raises:
        InputError: no JSON object; or a field, which is named, is missing, unknown, or of another type.
    """
    try:
        values = msgspec.json.decode(content) if isinstance(content, bytes) else content
        if unknown := _unknown(values, kind):
            raise InputError(f"{where} has the unknown key {unknown!r}")
        return msgspec.convert(values, kind)
    except msgspec.MsgspecError as error:
        said = str(error)
        if found := re.fullmatch(r"(.*) - at `\$\.([\w.]+)`", said):
            value = functools.reduce(operator.getitem, found[2].split("."), values)
            said = f"{found[2]} is {value!r:.100}: {found[1]}"
        raise InputError(f"{where}: {said}") from error
    except (UnicodeError, RecursionError) as error:
        raise InputError(f"{where}: no JSON in UTF-8: {error}") from error


def _unknown(values: Any, kind: Any) -> str | None:
    """The first key that no field has, dotted."""
    if not isinstance(values, Mapping) or not dataclasses.is_dataclass(kind):
        return None
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            return str(name)
        if (inner := _unknown(value, hints[name])) is not None:
            return f"{name}.{inner}"
    return None
