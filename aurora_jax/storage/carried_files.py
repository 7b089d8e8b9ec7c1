"""Files that a checkpoint carries beside its arrays, as JSON: text as it is, to be read there; what is not
UTF-8 in base64."""

import base64
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from aurora_jax.errors import InputError


def encode_files(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Contents by name as JSON values; the inverse of `decode_files`."""
    return {name: _encoded(content) for name, content in files.items()}


def _encoded(content: bytes) -> str | dict[str, str]:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def decode_files(values: Mapping[str, Any], where: object) -> dict[str, bytes]:
    """Contents by name. Names are plain, or of one sub-folder: whoever writes them below a folder stays there.

    Raises:
        InputError: a content is damaged, or a name leads elsewhere; `where` names the checkpoint.
    """
    files = {}
    for name, value in values.items():
        path = PurePosixPath(name)
        plain = str(path) == name and not {"\\", "\0"} & {*name}
        if not plain or path.is_absolute() or ".." in path.parts or len(path.parts) not in (1, 2):
            raise InputError(f"{where}: the file name {name!r} leads out of the folder; refusing to follow it.")
        try:
            files[name] = value.encode() if isinstance(value, str) else base64.b64decode(value["base64"], validate=True)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"{where}: the content of {name} is damaged: {error!r}.") from None
    return files


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes files into a folder that is there, byte for byte."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
