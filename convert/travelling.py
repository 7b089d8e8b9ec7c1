"""The files that travel with a model: all that is in its folder but weights, if it is small and text or the
tokenizer's.

By this rule and not by a list: licence, model card, chat templates, generation config and whatever else
somebody put there
arrive in the checkpoint, in the checkpoints and stages of runs that start from it, and in an export, byte for
byte. `config.json` is read, kept as JSON and written anew.
"""

from pathlib import Path

from aurora_jax.data.text.tokenizer_files import CHAT_TEMPLATES, TOKENIZER_FILES, is_tokenizer_file
from aurora_jax.errors import InputError

LARGEST_TEXT = 4 * 2**20
"""Bytes of a file that travels; a run writes all of them with each checkpoint."""

LARGEST_TOKENIZER_FILE = 128 * 2**20
"""Bytes of one of the tokenizer's files: a larger one is refused, for the model would arrive without it."""

WEIGHTS = (
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".gguf",
        ".npz",
        ".npy",
    ),
    *(".safetensors.index.json", ".bin.index.json", ".msgpack.index.json", ".h5.index.json"),
)
"""How files of weights end, and the indexes of their shards."""


def travelling_files(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The contents of the files of a model folder that travel, by name, and why each of the others does not.

    Of sub-folders only the tokenizer's own (`additional_chat_templates`) is looked into. A link is followed
    within the folder and, in the Hugging Face cache, to its blobs: another might bring in a file that was
    never the model's.

    Raises:
        InputError: a file of the tokenizer is too large, leads out of the folder or cannot be read.
    """
    files: dict[str, bytes] = {}
    left_behind: dict[str, str] = {}
    root = folder.resolve()
    templates = folder / CHAT_TEMPLATES
    for entry in sorted([*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
        name = str(entry.relative_to(folder))
        if name in ("config.json", CHAT_TEMPLATES):
            continue
        tokenizers_own = is_tokenizer_file(name)
        reason = _why_not(entry, name, root, LARGEST_TOKENIZER_FILE if tokenizers_own else LARGEST_TEXT)
        content = b""
        if not reason:
            try:
                content = entry.read_bytes()
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
        if not reason and not tokenizers_own and not _is_text(content):
            reason = "not text"
        if reason and (name in TOKENIZER_FILES or entry.parent == templates):
            raise InputError(f"{entry}: a file of the tokenizer that cannot travel with the model: {reason}.")
        if reason:
            left_behind[name] = reason
        else:
            files[name] = content
    return files, left_behind


def _why_not(entry: Path, name: str, root: Path, largest: int) -> str:
    """Why an entry does not travel, as far as can be said without reading it; an empty string if it may."""
    if name.endswith(WEIGHTS):
        return "weights"
    if entry.is_dir():
        return "a folder"
    if not entry.is_file():
        return "not a file"
    target = entry.resolve()
    # snapshots/<commit>/ of the cache holds links to ../../blobs/<digest>.
    if not target.is_relative_to(root) and target.parent != root.parent.parent / "blobs":
        return f"a link out of the folder, to {target}"
    if (size := entry.stat().st_size) > largest:
        return f"{size:,} bytes; at most {largest:,} travel"
    return ""


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False
