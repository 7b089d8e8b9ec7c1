"""Permutations, mixtures and the loader: a batch is a pure function of (seed, stage table, step)."""

import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_store

from aurora_jax.data.batches.loader import Batch, DataStage, Loader, evaluation_batches, spread_windows
from aurora_jax.data.batches.mixture import BlockMixture
from aurora_jax.data.batches.permutation import Permutation, permute
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.errors import InputError

# --- permutations


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    everything = np.arange(n)
    image = Permutation(n, key)(everything)
    assert sorted(image.tolist()) == everything.tolist()
    np.testing.assert_array_equal(Permutation(n, key).inverse(image), everything)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permutation_of_any_size_inverts(n: int, key: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True)))
    image = Permutation(n, key)(indices)
    assert image.min() >= 0
    assert image.max() < n
    assert len(set(image.tolist())) == len(indices)
    np.testing.assert_array_equal(Permutation(n, key).inverse(image), indices)


@pytest.mark.parametrize("n", [1000, 65_536, 100_003])
def test_permutation_mixes(n: int) -> None:
    """Serial correlations and those between keys stay within five standard errors of none; steps are as
    varied as a random order's."""
    image = Permutation(n, key=1)(np.arange(n)).astype(np.float64)
    bound = 5 / np.sqrt(n)
    for lag in (1, 2, 3, 7, 64):
        assert abs(np.corrcoef(image[:-lag], image[lag:])[0, 1]) < bound
    assert abs(np.corrcoef(image, np.arange(n))[0, 1]) < bound
    assert abs(np.corrcoef(image, Permutation(n, key=2)(np.arange(n)))[0, 1]) < bound
    # An affine map may show no serial correlation, but has one step only; a random permutation has about (1 -
    # 1/e) n different ones mod n.
    steps = len(np.unique(np.diff(image) % n))
    assert steps == pytest.approx((1 - np.exp(-1)) * n, rel=0.1)


@given(sizes=st.lists(st.integers(1, 5_000), min_size=1, max_size=5), data=st.data())
def test_many_permutations_at_once_are_each_of_them(sizes: list[int], data: st.DataObject) -> None:
    permutations = [Permutation(n, key=number) for number, n in enumerate(sizes)]
    draws = data.draw(
        st.lists(
            st.integers(0, len(sizes) - 1).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, sizes[p] - 1))),
            max_size=20,
        )
    )
    which, indices = np.array(draws, dtype=np.int64).reshape(-1, 2).T
    found = permute(permutations, which, indices)
    assert found.tolist() == [int(permutations[p](np.array([i]))[0]) for p, i in draws]


@pytest.mark.parametrize("index", [-1, 10])
def test_permutation_refuses_what_is_outside(index: int) -> None:
    with pytest.raises(IndexError, match=r"outside range\(10\)"):
        Permutation(10, 0)(np.array([3, index]))


# --- mixtures

RATES = st.lists(st.floats(0.05, 10), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(rates=RATES, key=st.integers(0, 2**32), sequences=st.integers(1, 3000))
def test_mixture_rates_and_order(rates: list[float], key: int, sequences: int) -> None:
    """Rates hold to less than a sequence at every block's end, and each task's sequences come as 0, 1, 2, ..."""
    mixture = BlockMixture(rates, key=key, block_size=2048 if min(rates) / sum(rates) < 1 / 256 else 256)
    task, index = mixture.assign(np.arange(sequences))
    for t in range(len(rates)):
        assert index[task == t].tolist() == list(range(np.sum(task == t)))
    assert mixture.consumed(sequences).tolist() == np.bincount(task, minlength=len(rates)).tolist()
    shares = np.array(rates) / sum(rates)
    blocks = sequences // mixture.block_size * mixture.block_size
    assert np.all(np.abs(np.bincount(task[:blocks], minlength=len(rates)) - blocks * shares) < 1 + 1e-6)


@settings(deadline=None, max_examples=30)
@given(rates=RATES, first=st.integers(0, 10**12))
def test_mixture_is_a_function_of_the_index(rates: list[float], first: int) -> None:
    indices = first + np.arange(600)
    whole = BlockMixture(rates, key=3, block_size=2048).assign(indices)
    mixture = BlockMixture(rates, key=3, block_size=2048)
    shuffled = np.random.default_rng(0).permutation(600)
    for one, other in zip(whole, mixture.assign(indices[shuffled]), strict=True):
        np.testing.assert_array_equal(one[shuffled], other)


def test_mixture_far_out_keeps_its_rates() -> None:
    mixture = BlockMixture([1, 2, 4], key=0)
    consumed = mixture.consumed(256 * 10**12)
    assert np.abs(consumed - 256 * 10**12 * np.array([1, 2, 4]) / 7).max() <= 1


@pytest.mark.parametrize(
    ("rates", "message"),
    [([], "positive"), ([1, 0], "positive"), ([1, float("nan")], "positive"), ([1, 0.001], "at least 1001")],
)
def test_impossible_rates(rates: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockMixture(rates, key=0)


# --- the loader

L = 8  # positions
counter = iter(range(10**9))


def make_store(documents: Sequence[Sequence[int]], eos_id: int | None = 0, tokenizer: str = "s") -> TokenStore:
    return write_store(f"memory://loader/{next(counter)}/", documents, eos_id=eos_id, tokenizer_sha256=tokenizer)


def random_documents(seed: int, tokens: int) -> list[list[int]]:
    """Documents of 1 to 14 tokens with 0 among the ordinary ones, each closed by a 0."""
    rng = np.random.default_rng(seed)
    documents: list[list[int]] = []
    while tokens > 0:
        length = min(int(rng.integers(1, 15)), tokens)
        documents.append([*rng.integers(0, 5, length - 1).tolist(), 0])
        tokens -= length
    return documents


def assert_equal(one: Batch, other: Batch) -> None:
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert a.dtype == b.dtype


@pytest.fixture(scope="module")
def stores() -> dict[str, TokenStore]:
    return {
        "a": make_store(random_documents(1, 403)),
        "b": make_store(random_documents(2, 90)),
        "c": make_store(random_documents(3, 1000)),
    }


STAGES = (
    DataStage("one", (("a", 3.0), ("b", 1.0)), steps=37),
    DataStage("two", (("c", 1.0), ("a", 1.0), ("b", 1.0)), steps=50),
)


def make_loader(stores: dict[str, TokenStore], seed: int = 5, across: bool = True, batch_size: int = 6) -> Loader:
    return Loader(stores, STAGES, batch_size=batch_size, sequence_length=L, seed=seed, attend_across_documents=across)


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(2, 300), batch_size=st.integers(1, 7), seed=st.integers(0, 100), across=st.booleans())
def test_every_token_is_a_target_once_an_epoch(tokens: int, batch_size: int, seed: int, across: bool) -> None:
    """Tokens are numbered by their places, so that targets tell where they came from. Two epochs, each
    complete, in different orders."""
    store = make_store([range(tokens)], eos_id=None)
    windows = -(-(tokens - 1) // L)
    steps = -(-2 * windows // batch_size)
    stage = DataStage("only", (("t", 1.0),), steps=steps)
    loader = Loader(
        {"t": store}, [stage], batch_size=batch_size, sequence_length=L, seed=seed, attend_across_documents=across
    )
    batches = [loader.batch(step) for step in range(steps)]
    tokens_NL, targets_NL, weights_NL, segments_NL = (
        np.concatenate([batch[field] for batch in batches])[: 2 * windows] for field in range(4)
    )
    assert set(np.unique(weights_NL)) <= {0, 1}
    np.testing.assert_array_equal(weights_NL > 0, segments_NL > 0)
    np.testing.assert_array_equal((tokens_NL + 1)[weights_NL > 0], targets_NL[weights_NL > 0])
    for epoch in range(2):
        rows = slice(epoch * windows, (epoch + 1) * windows)
        assert sorted(targets_NL[rows][weights_NL[rows] > 0].tolist()) == list(range(1, tokens))
    if windows > 20:
        assert not np.array_equal(targets_NL[:windows], targets_NL[windows:])


def test_epochs_go_on_across_stages(stores: dict[str, TokenStore]) -> None:
    """Task "a" is drawn in both stages: its windows, in the order of the run, are whole epochs one after the other."""
    numbered = {name: make_store([range(len(store))], eos_id=None) for name, store in stores.items()}
    loader = make_loader(numbered)
    seen: dict[str, list[int]] = {name: [] for name in numbered}
    for step in range(loader.steps):
        batch = loader.batch(step)
        for row, task in zip(batch.tokens_BL, batch.task_ids_B, strict=True):
            seen[loader.tasks[task]].append(int(row[0]) // L)
    for name, store in numbered.items():
        windows = -(-(len(store) - 1) // L)
        assert len(seen[name]) > windows or name == "c"
        for first in range(0, len(seen[name]), windows):
            epoch = seen[name][first : first + windows]
            assert len(set(epoch)) == len(epoch)


@pytest.mark.parametrize("across", [True, False])
def test_rows_of_hosts_make_the_batch(stores: dict[str, TokenStore], across: bool) -> None:
    loader = make_loader(stores, across=across)
    for step in (0, 36, 37, 86):
        whole = loader.batch(step)
        for hosts in (2, 3, 6):
            share = 6 // hosts
            parts = [
                make_loader(stores, across=across).batch(step, slice(host * share, (host + 1) * share))
                for host in range(hosts)
            ]
            assert_equal(whole, Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))))


def test_rows_read_nothing_else(stores: dict[str, TokenStore], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    windows = TokenStore.windows

    def recording(self: TokenStore, starts: np.ndarray, length: int) -> np.ndarray:
        read.extend(starts)
        return windows(self, starts, length)

    monkeypatch.setattr(TokenStore, "windows", recording)
    make_loader(stores).batch(3, slice(4, 6))
    assert len(read) == 2


def test_batches_do_not_depend_on_history(stores: dict[str, TokenStore]) -> None:
    straight = [make_loader(stores).batch(step) for step in range(87)]
    loader = make_loader(stores)
    for step in (80, 3, 80, 40, 0, 41):
        assert_equal(loader.batch(step), straight[step])
    for depth in (1, 2, 5):
        prefetched = list(make_loader(stores).prefetched(30, 87, depth))
        assert [step for step, _ in prefetched] == list(range(30, 87))
        for step, batch in prefetched:
            assert_equal(batch, straight[step])


def test_seed_decides(stores: dict[str, TokenStore]) -> None:
    assert_equal(make_loader(stores, seed=1).batch(4), make_loader(stores, seed=1).batch(4))
    assert not np.array_equal(
        make_loader(stores, seed=1).batch(4).tokens_BL, make_loader(stores, seed=2).batch(4).tokens_BL
    )


def test_realised_rates() -> None:
    stores = {name: make_store(random_documents(7, 2000)) for name in ("x", "y", "z")}
    loader = Loader(
        stores,
        [DataStage("s", (("x", 0.7), ("y", 0.2), ("z", 0.1)), steps=320)],
        batch_size=16,
        sequence_length=L,
        seed=0,
    )
    drawn = np.concatenate([loader.batch(step).task_ids_B for step in range(320)])
    np.testing.assert_allclose(np.bincount(drawn), 5120 * np.array([0.7, 0.2, 0.1]), atol=1)
    early = np.bincount(drawn[:80], minlength=3)  # 5 steps: a fair sample inside one block
    np.testing.assert_allclose(early, 80 * np.array([0.7, 0.2, 0.1]), atol=15)


def test_consecutive_windows_are_not_neighbours() -> None:
    store = make_store([range(8 * 2000 + 1)], eos_id=None)
    loader = Loader({"t": store}, [DataStage("s", (("t", 1.0),), steps=125)], batch_size=16, sequence_length=L, seed=0)
    order = np.concatenate([loader.batch(step).tokens_BL[:, 0] for step in range(125)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(2000)
    means = order.reshape(125, 16).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 5 / np.sqrt(125)


def test_segments_follow_documents_not_values(stores: dict[str, TokenStore]) -> None:
    """Segments and positions agree with a walk over the documents, which hold many a 0 that ends nothing."""
    documents = random_documents(1, 403)
    stream = [(token, number, place) for number, ids in enumerate(documents) for place, token in enumerate(ids)]
    assert Counter(token for ids in documents for token in ids[:-1])[0] > 20
    loader = Loader(
        {"a": stores["a"]},
        [DataStage("s", (("a", 1.0),), 51)],
        batch_size=1,
        sequence_length=L,
        seed=0,
        attend_across_documents=False,
    )
    across = Loader({"a": stores["a"]}, [DataStage("s", (("a", 1.0),), 51)], batch_size=1, sequence_length=L, seed=0)
    windows = {
        tuple(token for token, _, _ in stream[start : start + L + 1]): start for start in range(0, len(stream) - 1, L)
    }
    for step in range(51):
        batch, flat = loader.batch(step), across.batch(step)
        length = int((batch.segment_ids_BL > 0).sum())
        start = windows[(*batch.tokens_BL[0, :length].tolist(), int(batch.targets_BL[0, length - 1]))]
        numbers = [number for _, number, _ in stream[start : start + length]]
        assert batch.segment_ids_BL[0].tolist() == [1 + number - numbers[0] for number in numbers] + [0] * (L - length)
        expected = [min(place, k) for k, (_, _, place) in enumerate(stream[start : start + length])]
        assert batch.positions_BL[0, :length].tolist() == expected
        assert flat.segment_ids_BL[0].tolist() == [1] * length + [0] * (L - length)
        assert flat.positions_BL[0].tolist() == list(range(L))
        np.testing.assert_array_equal(flat.tokens_BL, batch.tokens_BL)
        np.testing.assert_array_equal(flat.targets_BL, batch.targets_BL)
        assert flat.loss_weights_BL[0].tolist() == [1] * length + [0] * (L - length)
        begins_a_document = [place == 0 for _, _, place in stream[start + 1 : start + length + 1]]
        assert batch.loss_weights_BL[0].tolist() == [float(not begins) for begins in begins_a_document] + [0] * (
            L - length
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("across", [True, False])
def test_no_target_crosses_an_isolated_boundary(across: bool, masked: bool) -> None:
    """In training and in evaluation: tokens are their own places, so a target tells whose it is. Boundaries fall inside
    windows, between two of them (16, 32), and around documents of one token, which in evaluation are nothing but an
    EOS."""
    lengths = [5, 11, 1, 1, 14, 8, 2, 30, 7, 18]
    firsts = set(np.cumsum(lengths)[:-1].tolist())
    learn = np.random.default_rng(0).random(sum(lengths)) < 0.7 if masked else np.ones(sum(lengths), bool)
    store = write_store(
        f"memory://loader/{next(counter)}/",
        np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]),
        learn=learn if masked else None,
    )
    loader = Loader(
        {"a": store},
        [DataStage("s", (("a", 1.0),), 3)],
        batch_size=5,
        sequence_length=L,
        seed=0,
        attend_across_documents=across,
    )
    training = [loader.batch(step) for step in range(3)]  # all windows, and some of the next epoch
    evaluation = list(evaluation_batches(store, 5, L, attend_across_documents=across))
    for batches in (training, evaluation):
        asked = np.concatenate([batch.targets_BL[batch.loss_weights_BL > 0] for batch in batches]).tolist()
        assert bool(firsts & set(asked)) == across
        ends = set() if batches is training else {first - 1 for first in firsts} | {sum(lengths) - 1}
        expected = {place for place in range(1, sum(lengths)) if learn[place]} - ends - (set() if across else firsts)
        assert set(asked) == expected


def test_evaluation_reads_windows_as_training_does(stores: dict[str, TokenStore]) -> None:
    """The same window has the same inputs, segments and positions; only the EOS, which is no text, is not asked for."""
    for across in (True, False):
        loader = make_loader(stores, across=across)
        for row in range(6):
            place, batch = loader.place(0, row), loader.batch(0, slice(row, row + 1))
            store = stores[place.task]
            window = np.array([place.start // L])
            (found,) = evaluation_batches(store, 1, L, attend_across_documents=across, windows=window)
            for name in ("tokens_BL", "targets_BL", "segment_ids_BL", "positions_BL"):
                np.testing.assert_array_equal(getattr(found, name), getattr(batch, name), err_msg=name)
            text = ~store.window_ends(window * L + 1, L)
            np.testing.assert_array_equal(found.loss_weights_BL, batch.loss_weights_BL * text)


@given(windows=st.integers(1, 5000), chosen=st.integers(1, 600))
def test_a_draw_of_windows_is_even(windows: int, chosen: int) -> None:
    """Neighbours are as far apart as any others, to one window, and so are the ends from the text's ends, by half of
    it."""
    drawn = spread_windows(windows, chosen)
    assert len(set(drawn.tolist())) == len(drawn) == min(windows, chosen)
    span = windows / len(drawn)
    np.testing.assert_allclose(drawn, (np.arange(len(drawn)) + 0.5) * span, atol=1, rtol=0)
    assert drawn[0] >= 0
    assert drawn[-1] < windows


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(2, 200), batch_size=st.integers(1, 5), with_eos=st.booleans())
def test_evaluation_counts_each_text_token_once(tokens: int, batch_size: int, with_eos: bool) -> None:
    documents = random_documents(tokens, tokens)
    stream = np.array([token for ids in documents for token in ids])
    is_eos = np.zeros(tokens, dtype=bool)
    is_eos[np.cumsum([len(ids) for ids in documents]) - 1] = with_eos
    batches = list(evaluation_batches(make_store(documents, eos_id=0 if with_eos else None), batch_size, L))
    assert all(batch.tokens_BL.shape == (batch_size, L) for batch in batches)
    weights = np.concatenate([batch.loss_weights_BL.reshape(-1) for batch in batches])
    targets = np.concatenate([batch.targets_BL.reshape(-1) for batch in batches])
    segments = np.concatenate([batch.segment_ids_BL.reshape(-1) for batch in batches])
    np.testing.assert_array_equal(weights[: tokens - 1], ~is_eos[1:])
    np.testing.assert_array_equal(targets[: tokens - 1], stream[1:])
    np.testing.assert_array_equal(segments, np.arange(len(segments)) < tokens - 1)
    assert not weights[tokens - 1 :].any()


def test_prefetch_passes_errors_on_and_closes(stores: dict[str, TokenStore], monkeypatch: pytest.MonkeyPatch) -> None:
    def loader_threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]

    loader = make_loader(stores)
    real = Loader.batch

    def failing(self: Loader, step: int, rows: slice | None = None) -> Batch:
        if step == 3:
            raise OSError("the disk is gone")
        return real(self, step, rows)

    monkeypatch.setattr(Loader, "batch", failing)
    batches = loader.prefetched(0, 9)
    assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not loader_threads()

    monkeypatch.undo()
    batches = loader.prefetched(0, 80)
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()


def test_position(stores: dict[str, TokenStore]) -> None:
    loader = make_loader(stores)
    assert loader.position(0) == {"stage": "one", "stage_step": 0, "epochs": {"a": 0, "b": 0, "c": 0}}
    position = loader.position(60)
    assert (position["stage"], position["stage_step"]) == ("two", 23)
    drawn = Counter(loader.tasks[task] for step in range(60) for task in loader.batch(step).task_ids_B)
    windows = {name: -(-(len(store) - 1) // L) for name, store in stores.items()}
    assert position["epochs"] == pytest.approx({name: drawn[name] / windows[name] for name in windows})


@pytest.mark.parametrize("step", [-1, 87])
def test_steps_outside_the_table(stores: dict[str, TokenStore], step: int) -> None:
    with pytest.raises(IndexError, match=r"\[0, 87\)"):
        make_loader(stores).batch(step)


def test_bad_stage_tables(stores: dict[str, TokenStore]) -> None:
    def check(stages: list[DataStage], message: str, **changed: TokenStore) -> None:
        with pytest.raises(InputError, match=message):
            Loader(stores | changed, stages, batch_size=2, sequence_length=L, seed=0)

    check([], "empty")
    check([DataStage("s", (("nowhere", 1.0),), 1)], "'nowhere', which has no store")
    check([DataStage("s", (("a", 1.0),), 0)], "0 steps")
    check([DataStage("s", (("a", 1.0), ("a", 1.0)), 1)], "twice")
    check([DataStage("s", (("a", -1.0),), 1)], "positive")
    check([DataStage("s", (("a", 1.0),), 1)], "at least 2 make a window", a=make_store([[0]]))
    check(
        [DataStage("s", (("a", 1.0), ("b", 1.0)), 1)],
        "different tokenizers",
        b=make_store([[1, 0]], tokenizer="another"),
    )


def test_what_is_not_to_be_learnt_has_no_loss() -> None:
    """Tokens are their own places here: the weight of each target is the mask at it, and all of an epoch's are seen."""
    learn = np.random.default_rng(0).random(97) < 0.5
    store = write_store(f"memory://loader/{next(counter)}/", np.split(np.arange(97), [10, 40, 41]), learn=learn)
    loader = Loader({"a": store}, [DataStage("one", (("a", 1.0),), 3)], batch_size=12, sequence_length=L, seed=0)
    batch = loader.batch(1)
    inside = batch.segment_ids_BL > 0
    np.testing.assert_array_equal(batch.loss_weights_BL, learn[batch.targets_BL] * inside)
    assert sorted(batch.targets_BL[inside]) == list(range(1, 97))
