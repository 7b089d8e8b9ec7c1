"""Files of strangers, malformed at random: each door opens them as what they are, or says in a sentence what is wrong.
No other exception, and no memory to speak of.

The mutations know the formats a little (JSON values of other kinds, sizes, names that lead elsewhere), since random
bytes alone are refused at the first brace.
"""

import ast
import copy
import json
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
from resealing import resealed
from stores import write_store
from test_convert import make_model

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.text.tokenizer import tokenizer_of
from aurora_jax.errors import InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.evaluate.report import write_report
from aurora_jax.generate.end_of_text import end_of_text_ids
from aurora_jax.storage import json_lines
from aurora_jax.storage.records import SHA256, with_digest
from convert.from_torch import from_torch

ROOT = Path(__file__).resolve().parents[1]
NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        7,
        10**9,
        10**18,
        2**63,
        2**64,
        10**40,
        -(10**18),
        0.5,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "float32",
        "BF16",
        "../../evil",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "x" * 10_000,
        "gelu",
        "model.safetensors",
    ),
    *([], {}, [1], [[[]]], {"a": 1}, [0, 10**15], [5, 3], [-1, 2]),
)


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inner for found in nodes(each, (*path, key)))]


def mutated_json(value: Any, draw: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        path = draw.choice(nodes(value)[1:] or [()])
        if not path:
            return copy.deepcopy(draw.choice(NASTY))
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = draw.random()
        if kind < 0.2:
            del parent[path[-1]]
        elif kind < 0.3 and isinstance(parent, dict):
            parent[draw.choice(("", "x", "../x", "transformer.wte.weight"))] = parent.pop(path[-1])
        else:
            parent[path[-1]] = copy.deepcopy(draw.choice(NASTY))
    return value


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        kind, at = draw.random(), draw.randrange(len(data) + 1)
        if kind < 0.25:
            del data[at:]
        elif kind < 0.5 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind < 0.7:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
        elif kind < 0.85:
            del data[at : at + draw.choice((1, 8, 100))]
        else:
            data[at : at + 8] = draw.choice((b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 2**40), b'{"a":1}\n'))
    return bytes(data)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """JSON by its values, or any file by its bytes."""
    if draw.random() < 0.7:
        try:
            text = json.dumps(mutated_json(json.loads(content), draw))
            return draw.choice((text, "[" * 100_000, text)).encode(errors="surrogatepass")
        except ValueError:
            pass
    return mutated_bytes(content, draw)


def mutated_safetensors(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return mutated_bytes(content, draw)
    size = struct.unpack("<Q", content[:8])[0]
    header = mutated(content[8 : 8 + size], draw)
    said = draw.choice((len(header), len(header), len(header), 2**63, 0, len(header) + 5))
    return struct.pack("<Q", said) + header + content[8 + size :]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, mini_tokenizer) -> Path:
    """One of each: hf, sharded, ours, store, metrics.jsonl."""
    folder = tmp_path_factory.mktemp("sound")
    make_model().save_pretrained(folder / "hf")
    make_model().save_pretrained(folder / "sharded", max_shard_size="9KB")
    shutil.copytree(mini_tokenizer, folder / "tokenizer")
    from_torch(folder / "hf", folder / "ours")
    write_store(folder / "store", [[1, 2, 3], [4, 5], [6]])
    rows = [
        {"step": 0, "stage": "start", "complete": True, "evaluation": {"fi": {"bits_per_byte": 2.0, "loss": 3.0}}},
        *({"step": step, "stage": "a", "loss": 3.0, "gradient_norm": 1.0, "learning_rate": 1e-3, "accepted": 1.0,
           "tokens": 9.0, "skipped": 0.0, "task_loss": {"fi": 3.0}, "tokens_per_second": 5.0} for step in range(3)),
        {"step": 3, "stage": "a", "complete": True, "evaluation": {"fi": {"bits_per_byte": 1.5, "loss": 2.0}}},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_bytes(b"".join(map(json_lines.line_of, rows)))
    return folder


Door = Callable[[Path, Path, random.Random], None]


def weights(sound: Path, folder: Path, draw: random.Random) -> None:
    source = shutil.copytree(sound / draw.choice(("hf", "sharded")), folder / "hf")
    file = draw.choice(sorted(file for file in source.iterdir() if file.suffix in (".json", ".safetensors")))
    change = mutated_safetensors if file.suffix == ".safetensors" else mutated
    file.write_bytes(change(file.read_bytes(), draw))
    from_torch(source, folder / "ours")
    restore_parameters(folder / "ours")


def tokenizers(sound: Path, folder: Path, draw: random.Random) -> None:
    files = {file.name: file.read_bytes() for file in (sound / "tokenizer").iterdir()}
    name = draw.choice(sorted(files))
    files[name] = mutated(files[name], draw)
    tokenizer_of(files, folder).encode("Helsinki")


def checkpoints(sound: Path, folder: Path, draw: random.Random) -> None:
    """With a digest that fits: a stranger can make one."""
    ours = shutil.copytree(sound / "ours", folder / "ours")
    file = ours / draw.choice(("metadata", "metadata", "tokenizer")) / "metadata"
    values = mutated_json(json.loads(file.read_text()), draw)
    if isinstance(values, dict) and SHA256 in values:
        values = resealed(values)
    file.write_bytes(json.dumps(values).encode(errors="surrogatepass"))
    metadata = checkpoint.read_metadata(ours)
    files = checkpoint.read_files(ours)
    restore_parameters(ours)
    end_of_text_ids(
        metadata, files, tokenizer_of({"tokenizer.json": (sound / "tokenizer/tokenizer.json").read_bytes()}, "t")
    )


def token_stores(sound: Path, folder: Path, draw: random.Random) -> None:
    store = shutil.copytree(sound / "store", folder / "store")
    file = draw.choice(sorted(file for file in store.rglob("*.json") if file.is_file()))
    values = mutated_json(json.loads(file.read_text()), draw)
    if isinstance(values, dict) and SHA256 in values:
        values = with_digest({name: value for name, value in values.items() if name != SHA256})
    file.write_bytes(json.dumps(values).encode(errors="surrogatepass"))
    opened = TokenStore.open(store)
    opened.windows(np.array([0], np.int64), 4)
    opened.document(0)


def lines(sound: Path, folder: Path, draw: random.Random) -> None:
    content = (sound / "metrics.jsonl").read_bytes()
    if draw.random() < 0.5:
        rows = [json.loads(line) for line in content.splitlines()]
        number = draw.randrange(len(rows))
        rows[number] = mutated_json(rows[number], draw)
        content = b"".join(json.dumps(row).encode(errors="surrogatepass") + b"\n" for row in rows)
    else:
        content = mutated_bytes(content, draw)
    (folder / "metrics.jsonl").write_bytes(content)
    read_metrics(folder / "metrics.jsonl")
    write_report(folder, folder / "report.html")


DOORS: dict[str, tuple[Door, int]] = {
    "weights": (weights, 8_000),
    "tokenizers": (tokenizers, 4_000),
    "checkpoints": (checkpoints, 4_000),
    "token stores": (token_stores, 3_500),
    "lines": (lines, 500),
}
"""And how many of 20,000 files go through each in the long test."""
GIGABYTE = 2**20
"""In the unit of ru_maxrss, kB."""


def try_door(name: str, sound: Path, tmp_path: Path, seeds: range) -> None:
    door, opened = DOORS[name][0], 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        try:
            door(sound, folder, random.Random(seed))
            opened += 1
        except InputError:
            pass
        except Exception as error:
            error.add_note(f"{name}, seed {seed}")
            raise
        shutil.rmtree(folder)
    assert opened < len(seeds) * 0.9, "the mutations do nothing"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE


@pytest.mark.parametrize("name", DOORS)
def test_a_malformed_file_is_an_error_in_words(sound, tmp_path, capsys, name):
    try_door(name, sound, tmp_path, range(10**6, 10**6 + DOORS[name][1] // 200))


@pytest.mark.full
@pytest.mark.parametrize("name", DOORS)
def test_twenty_thousand_malformed_files(sound, tmp_path, capsys, name):
    try_door(name, sound, tmp_path, range(DOORS[name][1]))


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_door_runs_what_it_reads():
    """No pickle but PyTorch's with `weights_only`, no code of a model, no evaluated text."""
    assert tensorstore  # the reader of checkpoints and stores knows no code at all
    for path in [*(ROOT / "aurora_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        for name, call in calls(ast.parse(path.read_text())):
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            where = f"{path.relative_to(ROOT)}, line {call.lineno}: {name}"
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "marshal.loads"), where
            assert name != "torch.load" or words.get("weights_only") == "True", where
            assert words.get("allow_pickle", "False") == words.get("trust_remote_code", "False") == "False", where
