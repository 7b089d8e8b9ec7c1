"""The files that are a tokenizer: which of a folder's they are, and what makes two tokenizers the same.

A folder may describe its tokenizer more than once. What counts, here as in `transformers`, is the first of

tokenizer.json                  of the `tokenizers` library; its SHA-256 is the tokenizer's
tokenizer.model                 SentencePiece; its SHA-256 is the tokenizer's
vocab.json with merges.txt      GPT-2's byte-level BPE; the SHA-256 is that of what they say, added tokens included
tokenizer_config.json           of the class ByT5Tokenizer: the bytes of UTF-8, which need no file of their own

One of our checkpoints is such a folder too, by the files that it carries.

The digest is what token stores record of the tokenizer that made them, and what checkpoints record of theirs.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from aurora_jax.data.batches.store import read_info
from aurora_jax.errors import InputError
from aurora_jax.storage.carried_files import decode_files
from aurora_jax.storage.records import object_in

Files: TypeAlias = dict[str, bytes]
"""Contents by name; a name in `additional_chat_templates/` has that folder before it."""

Kind = Literal["tokenizer.json", "tokenizer.model", "vocab.json", "bytes"]

CHAT_TEMPLATES = "additional_chat_templates"
"""The one sub-folder that belongs to a tokenizer."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is the tokenizer's own in the folder of a model, beside vocabularies of other names ending in `.model`."""

BYTES = "bytes"
BYTES_SHA256 = hashlib.sha256(b"UTF-8 bytes from 3").hexdigest()
BYTES_FILES: Files = {"tokenizer_config.json": b'{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}\n'}
"""The tokenizer of bytes as files: `transformers.ByT5Tokenizer` loads them."""

GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
"""Values of `tokenizer_class` under which vocab.json and merges.txt mean what they mean for GPT-2."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model folder belongs to the tokenizer, by its name."""
    return name in TOKENIZER_FILES or name.endswith(".model") or name.startswith(f"{CHAT_TEMPLATES}/")


def read_tokenizer_files(path: str | Path) -> Files:
    """The files of the tokenizer that a user names, as a checkpoint carries them.

    Args:
        path: a folder or one of our checkpoints, of which the tokenizer's files are taken; a file, which
            becomes tokenizer.json or tokenizer.model whatever its name, and brings the rest of its folder
            only where it has that name already; or the word "bytes".

    Raises:
        InputError: there is no tokenizer at `path`, or it cannot be read.
    """
    path = Path(path)
    if path == Path(BYTES) and not path.exists():
        return dict(BYTES_FILES)
    try:
        if not path.is_dir():
            name = "tokenizer.model" if path.suffix == ".model" else "tokenizer.json"
            named = {name: path.read_bytes()}
            beside = _files_in(path.parent) if path.name == name else {}
            if name == "tokenizer.model":  # a tokenizer.json beside it would count before it
                beside.pop("tokenizer.json", None)
            return {**beside, **named}
        files = _files_in(path)
    except OSError as error:
        raise InputError(
            f"{path}: the tokenizer cannot be read ({error.strerror}); give a tokenizer.json or its folder"
        ) from error
    if kind_of(files, path) is None:
        raise no_tokenizer(path)
    return files


def _files_in(folder: Path) -> Files:
    entries = sorted([*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*.jinja")])
    named = {str(entry.relative_to(folder)): entry for entry in entries if entry.is_file()}
    files = {name: file.read_bytes() for name, file in named.items() if is_tokenizer_file(name)}
    if not files and (carried := folder / "tokenizer" / "metadata").is_file():
        values = _json_of({carried.name: carried.read_bytes()}, carried.name, carried.parent)
        files = {name: content for name, content in decode_files(values, carried).items() if is_tokenizer_file(name)}
    return files


def no_tokenizer(where: str | Path) -> InputError:
    """The error of a folder or checkpoint in which there is none."""
    return InputError(
        f"{where}: no tokenizer: tokenizer.json, tokenizer.model, or vocab.json with merges.txt is expected"
    )


def kind_of(files: Mapping[str, bytes], where: str | Path) -> Kind | None:
    """Which of the files is the tokenizer (see above); None if none is. Raises InputError for a malformed one."""
    if "tokenizer.json" in files:
        return "tokenizer.json"
    if "tokenizer.model" in files:
        return "tokenizer.model"
    if "vocab.json" in files and "merges.txt" in files:
        return "vocab.json"
    if (
        "tokenizer_config.json" in files
        and _json_of(files, "tokenizer_config.json", where).get("tokenizer_class") == "ByT5Tokenizer"
    ):
        return "bytes"
    return None


def tokenizer_sha256(files: Mapping[str, bytes], where: str | Path) -> str | None:
    """The digest that tells tokenizers apart, in hexadecimal: `Tokenizer.sha256` of the same files. None
    without a tokenizer.

    Raises:
        InputError: vocab.json, merges.txt or tokenizer_config.json is malformed, where these count.
    """
    kind = kind_of(files, where)
    if kind is None:
        return None
    if kind == "bytes":
        return BYTES_SHA256
    if kind == "vocab.json":
        return hashlib.sha256(json.dumps(_gpt2_definition(files, where), sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(files[kind]).hexdigest()


def gpt2_tokenizer_json(files: Mapping[str, bytes], where: str | Path) -> str:
    """The `tokenizer.json` that says what vocab.json and merges.txt mean, as `transformers.GPT2Tokenizer` reads them.

    Raises:
        InputError: a file is malformed, ids that do not fit together, or a `tokenizer_class` that is not GPT-2's.
    """
    definition = _gpt2_definition(files, where)
    if definition["class"] != "GPT2Tokenizer":
        raise InputError(
            f"{where}: vocab.json and merges.txt of the class {definition['class']} cannot be read, only "
            "GPT-2's: load the folder "
            "with transformers and save_pretrained() it, which writes a tokenizer.json"
        )
    try:
        model = models.BPE(definition["vocab"], [tuple(merge) for merge in definition["merges"]], fuse_unk=False)
        tokenizer = tokenizers.Tokenizer(model)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{where}: vocab.json and merges.txt do not belong together: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=definition["add_prefix_space"])
    tokenizer.decoder = decoders.ByteLevel()
    for token in definition["added"]:
        flags = {flag: token[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokenizer.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        found = tokenizer.token_to_id(token["content"])
        if token["id"] not in (None, found):
            raise InputError(
                f"{where}: the added token {token['content']!r} is said to be {token['id']}, but is {found} "
                "in vocab.json"
            )
    return tokenizer.to_str()


def _gpt2_definition(files: Mapping[str, bytes], where: str | Path) -> dict[str, Any]:
    """What vocab.json, merges.txt and the files of added tokens say, as JSON values, however they are written."""
    config, names = (_json_of(files, name, where) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    kind = config.get("tokenizer_class")
    try:
        lines = files["merges.txt"].decode().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}/merges.txt: not UTF-8: {error}") from error
    merges = [line.removesuffix("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise InputError(f"{where}/merges.txt: {' '.join(wrong)!r} is not two tokens")
    vocab = _json_of(files, "vocab.json", where)
    if not all(type(i) is int for i in vocab.values()):
        raise InputError(f"{where}/vocab.json: tokens and their ids are expected")
    try:
        added = _added_tokens(config, names, _json_of(files, "added_tokens.json", where))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: the added tokens of the tokenizer are malformed: {error!r}") from error
    return {
        "class": "GPT2Tokenizer" if kind in GPT2_CLASSES else str(kind),
        "vocab": vocab,
        "merges": merges,
        "added": added,
        "add_prefix_space": bool(config.get("add_prefix_space", False)),
    }


def _added_tokens(config: dict[str, Any], names: dict[str, Any], ids: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens beside the vocabulary, those with ids first; `transformers` looks into older files where the
    config has none."""

    def token(content: str | dict[str, Any], special: bool, i: int | None = None) -> dict[str, Any]:
        given = content if isinstance(content, dict) else {"content": content}
        defaults = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": not special,
            "special": special,
        }
        return {**defaults, **{key: given[key] for key in (*defaults, "content") if key in given}, "id": i}

    decoder = config.get("added_tokens_decoder")
    named = {**config, **(names if decoder is None else {})}
    defaults = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    special = [value for name in NAMED_TOKENS if (value := named.get(name, defaults.get(name))) is not None]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = named.get(name) or []
        special += more.values() if isinstance(more, dict) else more
    specials = {value["content"] if isinstance(value, dict) else value: value for value in special}
    if decoder is not None:
        added = [token(value, bool(value.get("special", False)), int(i)) for i, value in decoder.items()]
    else:
        added = [token(content, content in specials, int(i)) for content, i in ids.items()]
    added.sort(key=lambda each: each["id"])
    present = {each["content"] for each in added}
    return added + [token(value, True) for content, value in specials.items() if content not in present]


def _json_of(files: Mapping[str, bytes], name: str, where: str | Path) -> dict[str, Any]:
    return object_in(files.get(name, b"{}"), f"{where}/{name}")


def require_tokenizer_of_stores(sha256: str, where: str | Path, directories: Mapping[str, str]) -> None:
    """Were the stores that are there already made with this tokenizer?

    Args:
        sha256: of the tokenizer that is to read or write them.
        where: it comes from, for messages.
        directories: of the stores, by task.

    Raises:
        InputError: one was not; both digests are named.
    """
    for task, directory in directories.items():
        info = read_info(directory)
        if info is not None and info.tokenizer_sha256 != sha256:
            raise InputError(
                f"{directory}: the store of {task} was made with the tokenizer {info.tokenizer_sha256[:12]}, "
                f"but {where} is "
                f"{sha256[:12]}: name the tokenizer that the stores were made with, or choose another folder of stores"
            )
