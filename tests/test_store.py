"""The token store: what goes in comes out, and what is not complete is not a store."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

from aurora_jax.data import store as store_module
from aurora_jax.data.store import TokenStore, read_info
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
    tokens, ends = store.windows(np.array(starts, dtype=np.int64), length), store.window_ends(np.array(starts, dtype=np.int64), length)
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
    with pytest.raises(ValueError, match=r"(?i)crc|checksum|digest"):
        TokenStore.open(directory).read(0, 1000)
    (directory / "ends" / "zarr.json").unlink()
    with pytest.raises(InputError, match="damaged token store"):
        TokenStore.open(directory)
    (directory / "store.json").write_text("{}")
    with pytest.raises(InputError, match=r"store\.json is not"):
        TokenStore.open(directory)


def test_import_is_light() -> None:
    """The loader runs on every host of a pod; TensorFlow must not come with it."""
    code = "import sys, aurora_jax.data.loader, aurora_jax.data.store; sys.exit('tensorflow' in sys.modules or 'seqio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
