"""The token store: what goes in comes out, and what is not complete is not a store."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

from aurora_jax.data.batches import store as store_module
from aurora_jax.data.batches.store import TokenStore, read_info
from aurora_jax.errors import InputError


@settings(deadline=None, max_examples=25)
@given(
    written=st.lists(st.lists(st.integers(0, 49_999), max_size=90), max_size=12).filter(any),
    data=st.data(),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, written: list[list[int]], data: st.DataObject) -> None:
    """Reads of every kind equal slices of the plain list; token 0 is kept, empty documents leave none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "SHARD_ELEMENTS", 32)
        patch.setattr(store_module, "CHUNK_ELEMENTS", 8)
        directory = tmp_path_factory.mktemp("store")
        store = write_store(directory, written)
    documents = [ids for ids in written if ids]
    stream = [i for ids in documents for i in ids]
    assert len(store) == len(stream)
    assert store.info.documents == len(documents)
    assert store.read(0, len(stream)).tolist() == stream
    for index, ids in enumerate(documents):
        assert store.document(index).tolist() == ids
    starts = data.draw(st.lists(st.integers(0, len(stream)), max_size=5))
    length = data.draw(st.integers(0, 50))
    last = np.cumsum([len(ids) for ids in documents]) - 1
    tokens, ends = (
        store.windows(np.array(starts, dtype=np.int64), length),
        store.window_ends(np.array(starts, dtype=np.int64), length),
    )
    assert tokens.shape == ends.shape == (len(starts), length)
    for row, start in enumerate(starts):
        inside = len(stream[start : start + length])
        assert tokens[row].tolist() == stream[start : start + length] + [0] * (length - inside)
        assert ends[row].tolist() == [start + k in last for k in range(length)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_token_type_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = np.array([0, vocab_size - 1])
    store = write_store(tmp_path / "s", [ids], vocab_size=vocab_size)
    assert store.document(0).tolist() == ids.tolist()
    assert json.loads((tmp_path / "s" / "tokens" / "zarr.json").read_text())["data_type"] == dtype


@pytest.mark.parametrize("place", ["memory://test_places/", "file://{}/a/b", "{}/spa ce/日本語"])
def test_places(tmp_path: Path, place: str) -> None:
    assert write_store(place.format(tmp_path), [np.arange(5)]).read(1, 4).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (4, 3)])
def test_outside_is_an_error(tmp_path: Path, start: int, stop: int) -> None:
    store = write_store(tmp_path / "s", [np.arange(5)])
    with pytest.raises(IndexError, match=r"outside tokens \[0, 5\)"):
        store.read(start, stop)


def test_without_its_description_it_is_no_store(tmp_path: Path) -> None:
    """What a killed build leaves: arrays. The next build takes the place over, also with arrays of other sizes."""
    write_store(tmp_path / "s", [np.arange(100)])
    (tmp_path / "s" / "store.json").unlink()
    assert read_info(tmp_path / "s") is None
    with pytest.raises(InputError, match="no complete token store"):
        TokenStore.open(tmp_path / "s")
    assert write_store(tmp_path / "s", [np.arange(3)]).read(0, 3).tolist() == [0, 1, 2]


def test_what_is_to_be_learnt(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [[5, 6, 7], [8, 9]], learn=[False, True, True, False, True])
    assert store.window_learn(np.array([1, 3]), 3).tolist() == [[True, True, False], [False, True, False]]
    plain = write_store(tmp_path / "plain", [[5, 6]])
    assert plain.window_learn(np.array([0]), 2).all()
    assert not (tmp_path / "plain" / "learn").exists()


def test_fingerprint_mismatch_names_both(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [np.arange(3)])
    assert len(TokenStore.open(tmp_path / "s", "f" * 64)) == 3
    with pytest.raises(InputError, match=f"{'f' * 16}.*{'e' * 16}"):
        TokenStore.open(tmp_path / "s", "e" * 64)


def test_damage_is_noticed(tmp_path: Path) -> None:
    """A flipped bit fails the checksum, a missing array and a broken description are named."""
    directory = tmp_path / "s"
    write_store(directory, [np.random.default_rng(0).integers(0, 50_000, 1000)])
    (shard,) = (path for path in (directory / "tokens").rglob("*") if path.is_file() and path.name != "zarr.json")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"(?i)crc|checksum|digest"):
        TokenStore.open(directory).read(0, 1000)
    (directory / "ends" / "zarr.json").unlink()
    with pytest.raises(InputError, match="damaged token store"):
        TokenStore.open(directory)
    (directory / "store.json").write_text("{}")
    with pytest.raises(InputError, match=r"store\.json is not"):
        TokenStore.open(directory)


def test_import_is_light() -> None:
    """The loader runs on every host of a pod; TensorFlow must not come with it."""
    modules = "aurora_jax.data.batches.loader, aurora_jax.data.batches.store"
    code = f"import sys, {modules}; sys.exit('tensorflow' in sys.modules or 'seqio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


# ---------------------------------------------------------------- What is missing or damaged


def shards(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("*/c/*")) if path.is_file()]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_ELEMENTS", 32)
    monkeypatch.setattr(store_module, "CHUNK_ELEMENTS", 8)


ZEROS = [[0] * 70, [5, 6] + [0] * 40, *([0] for _ in range(40))]
"""Documents of which some chunks and shards are all zeros, ends and mask all false."""
LEARN = [False] * 69 + [True] + [False] * 41 + [True] + [True] * 40


def test_every_chunk_is_stored(tmp_path: Path, small: None) -> None:
    """Those of zeros too: what is read is what was written, and there is a file for each shard of each array."""
    store = write_store(tmp_path / "s", ZEROS, learn=LEARN)
    assert store.read(0, len(store)).tolist() == [i for ids in ZEROS for i in ids]
    assert store.window_learn(np.array([0]), len(store))[0].tolist() == LEARN
    names = {f"{name}/c/{shard}" for name in ("tokens", "ends", "learn") for shard in range(5)} | {
        "offsets/c/0",
        "offsets/c/1",
    }
    assert {str(path.relative_to(tmp_path / "s")) for path in shards(tmp_path / "s")} == names


def test_a_missing_shard_is_named_at_open(tmp_path: Path, small: None) -> None:
    """Every one of every array. TensorStore's own default would read zeros: end-of-text tokens, in
    StarCoder's vocabulary."""
    write_store(tmp_path / "s", ZEROS, learn=LEARN)
    for path in shards(tmp_path / "s"):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(
            InputError, match=rf"{tmp_path}/s: .*the file {path.relative_to(tmp_path / 's')} is missing"
        ):
            TokenStore.open(tmp_path / "s")
        path.write_bytes(content)
    for path in shards(tmp_path / "s")[:3]:
        path.unlink()
    with pytest.raises(InputError, match=r"ends/c/0 and 2 more is missing"):
        TokenStore.open(tmp_path / "s")


@pytest.mark.parametrize("damage", ["gone", "emptied", "cut short", "a bit"])
def test_damage_that_reading_finds_names_the_file(tmp_path: Path, small: None, damage: str) -> None:
    write_store(tmp_path / "s", ZEROS, learn=LEARN)
    for path in shards(tmp_path / "s"):
        store = TokenStore.open(tmp_path / "s")
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(
                {"emptied": b"", "cut short": content[:-3], "a bit": bytes([content[0] ^ 1]) + content[1:]}[damage]
            )
        with pytest.raises(InputError, match=rf"{tmp_path}/s: a damaged token store.*{path}"):
            _read_all(store)
        path.write_bytes(content)
    _read_all(TokenStore.open(tmp_path / "s"))


def _read_all(store: TokenStore) -> None:
    everything = np.array([0]), len(store)
    store.windows(*everything)
    store.window_ends(*everything)
    store.window_learn(*everything)
    for index in range(store.info.documents):
        store.document(index)


def test_stores_without_chunks_of_zeros_still_open(tmp_path: Path, small: None) -> None:
    """As the first formats wrote them: TensorStore's default leaves out what is all zeros. A shard that
    cannot be all zeros is missed."""
    directory = tmp_path / "s"
    documents = [[7] * 69 + [0], [5, 6] + [7] * 39 + [0], *([0] for _ in range(48))]
    learn = [False] * 69 + [True] + [False] * 41 + [True] + [True] * 48
    write_store(directory, documents, learn=learn)
    info = json.loads((directory / "store.json").read_text())
    for name in ("format", "sha256"):
        info.pop(name, None)
    (directory / "store.json").write_text(json.dumps(info))
    plain = {"tokens": [i for ids in documents for i in ids], "learn": learn}
    plain["ends"] = [place == len(ids) - 1 for ids in documents for place in range(len(ids))]
    for path in shards(directory):
        path.unlink()
    offsets = np.cumsum([0, *map(len, documents)])
    for name, values in (*plain.items(), ("offsets", offsets)):
        spec = {"driver": "zarr3", "kvstore": f"file://{directory}/{name}/"}
        array = ts.open(spec, open=True, write=True).result()
        array[:].write(np.asarray(values, array.dtype.numpy_dtype)).result()
    left = {str(path.relative_to(directory)) for path in shards(directory)}
    assert {f"{name}/c/{shard}" for name in ("tokens", "ends", "learn") for shard in range(5)} - left == {
        "tokens/c/4",  # documents of one end-of-text token
        "ends/c/0",
        "ends/c/1",
        "learn/c/0",
        "learn/c/1",
    }
    store = TokenStore.open(directory)
    assert store.read(0, len(store)).tolist() == plain["tokens"]
    assert store.window_ends(np.array([0]), len(store))[0].tolist() == plain["ends"]
    assert store.window_learn(np.array([0]), len(store))[0].tolist() == learn
    for path in shards(directory):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(InputError, match=rf"the file {path.relative_to(directory)} is missing"):
            TokenStore.open(directory)
        path.write_bytes(content)


def read_all(directory: Path) -> tuple:
    store = TokenStore.open(directory)
    size = len(store)
    documents = [store.document(index).tolist() for index in range(store.info.documents)]
    return store.info, store.read(0, size).tolist(), store.window_ends(np.array([0]), size).tolist(), documents


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.full)])
def test_a_flipped_bit_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Of any file of a store, its description too: what is read is what was written, or it is refused."""
    monkeypatch.setattr(store_module, "SHARD_ELEMENTS", 64)
    monkeypatch.setattr(store_module, "CHUNK_ELEMENTS", 16)
    rng = np.random.default_rng(0)
    write_store(tmp_path / "sound", [rng.integers(50_000, size=size).tolist() for size in range(1, 25)])
    expected, refused = read_all(tmp_path / "sound"), 0
    files = sorted(file.relative_to(tmp_path / "sound") for file in (tmp_path / "sound").rglob("*") if file.is_file())
    for number in range(count):
        copy = tmp_path / f"copy{number}"  # another path: nothing of the one before is cached
        shutil.copytree(tmp_path / "sound", copy)
        file = copy / files[rng.integers(len(files))]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        try:
            assert read_all(copy) == expected, f"{file}, copy {number}"
        except InputError:
            refused += 1
        shutil.rmtree(copy)
    assert refused > count / 2
