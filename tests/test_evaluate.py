"""Bits per byte against direct computations: from full logits, and by `transformers` from the text itself."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SENTENCES
from stores import write_store

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.text.tokenizer import HuggingFaceTokenizer, Tokenizer
from aurora_jax.errors import InputError
from aurora_jax.evaluate.bits_per_byte import Evaluator, Score
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters, merge, structure_of
from aurora_jax.model.likelihood import Likelihood
from aurora_jax.model.mesh import MeshConfig, make_mesh
from convert.__main__ import main as convert

CONFIG = ModelConfig(
    vocabulary_size=31, max_positions=16, width=16, layers=2, heads=2, mlp_width=24, initializer_range=0.5
)
FP32 = ComputeConfig("float32", "float32")
L = 16


class Sizes(Tokenizer):
    """Token i stands for i % 3 + 1 bytes, and there are no special tokens."""

    path, sha256, vocab_size, eos_id, unk_id = "sizes", "t" * 64, 31, 0, None
    cuts_freely = True

    def no_text(self, *_):
        raise NotImplementedError

    encode_batch = decode = special_id = _encode_behind = _normalised = no_text

    def has(self, i):
        return 0 <= i < self.vocab_size

    def special_name(self, i):
        return None

    def token_bytes(self, i):
        return bytes(i % 3 + 1)


def make_store(directory, documents: list[np.ndarray], text_bytes: int, **info) -> TokenStore:
    made = {"vocab_size": 31, "split": "validation", "text_bytes": text_bytes, "tokenizer_sha256": "t" * 64}
    return write_store(directory, documents, **(made | info))


def evaluate(model, parameters, store, tokenizer=None, *, windows=None, batch_size=3, length=L, across=True) -> Score:
    likelihood = Likelihood(model, FP32, make_mesh(MeshConfig(), jax.devices()[:1]), isolate_documents=not across)
    evaluator = Evaluator(likelihood, {"t": store}, tokenizer or Sizes(), batch_size=batch_size, sequence_length=length)
    return evaluator(parameters, windows)["t"]


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    # Token 0 stands inside documents too: only the last of each is its end.
    return [np.append(rng.integers(31, size=length), 0) for length in (5, 30, 1, 22)]


def direct(structure, parameters, documents, windows=None) -> tuple[float, int, int]:
    """Sum of nll over the text's tokens, their number and their sizes in `Sizes`, window by window, in numpy."""
    stream = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents]) - 1
    nll, tokens, sizes = 0.0, 0, 0
    for start in range(0, len(stream) - 1, L) if windows is None else [window * L for window in windows]:
        window = stream[start : start + L + 1]
        decoder = merge(structure, parameters)
        logits = np.asarray(decoder.logits(decoder(jnp.asarray(window[None, :-1])))[0], np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for place, target in enumerate(window[1:]):
            if start + place + 1 not in ends:
                nll -= log_probabilities[place, target]
                tokens += 1
                sizes += int(target) % 3 + 1
    return nll, tokens, sizes


def size_of_text(documents) -> int:
    return sum(int(token) % 3 + 1 for document in documents for token in document[:-1])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_bits_per_byte(tmp_path, documents, batch_size):
    structure, parameters = structure_of(CONFIG, FP32), initial_parameters(CONFIG, 0)
    store = make_store(tmp_path / "store", documents, text_bytes=size_of_text(documents))
    nll, tokens, sizes = direct(structure, parameters, documents)
    score = evaluate(CONFIG, parameters, store, batch_size=batch_size)
    assert score.tokens == tokens == 57
    assert score.bytes == sizes == size_of_text(documents) - documents[0][0] % 3 - 1
    assert score.loss == pytest.approx(nll / tokens, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / sizes, rel=1e-5)
    assert score.windows == 4


def test_a_quick_evaluation_reads_windows_from_all_over_the_text(tmp_path, documents):
    """Two of four are the second and the fourth; as many as there are, the complete evaluation; so many, not so many
    batches."""
    structure, parameters = structure_of(CONFIG, FP32), initial_parameters(CONFIG, 0)
    store = make_store(
        tmp_path / "store", documents, text_bytes=2 * size_of_text(documents)
    )  # a normalising tokenizer's
    nll, tokens, sizes = direct(structure, parameters, documents, windows=[1, 3])
    for batch_size in (1, 3, 16):
        quick = evaluate(CONFIG, parameters, store, windows=2, batch_size=batch_size)
        assert (quick.tokens, quick.windows) == (tokens, 2)
        assert quick.loss == pytest.approx(nll / tokens, rel=1e-5)
        assert quick.bits_per_byte == pytest.approx(nll / math.log(2) / (2 * sizes), rel=1e-5)
    assert evaluate(CONFIG, parameters, store, windows=9) == evaluate(CONFIG, parameters, store)


def test_text_that_cannot_be_predicted_or_has_another_tokenizer_is_refused(tmp_path, documents):
    _structure, parameters = structure_of(CONFIG, FP32), initial_parameters(CONFIG, 0)
    alone = make_store(tmp_path / "alone", [np.array([3, 0]), np.array([4, 0])], text_bytes=2)
    with pytest.raises(InputError, match="first token of an isolated document"):
        evaluate(CONFIG, parameters, alone, across=False)
    with pytest.raises(InputError, match=f"{'u' * 12}.*{'t' * 12}"):
        evaluate(CONFIG, parameters, make_store(tmp_path / "other", documents, text_bytes=9, tokenizer_sha256="u" * 64))


def test_questions_are_not_measured_as_they_are_not_trained(tmp_path, documents):
    _structure, parameters = structure_of(CONFIG, FP32), initial_parameters(CONFIG, 0)
    learn = np.arange(sum(map(len, documents))) >= 40
    masked = make_store(tmp_path / "masked", documents, text_bytes=size_of_text(documents), learn=learn)
    score = evaluate(CONFIG, parameters, masked)
    assert score.tokens == 22 - 1  # the last document begins at 40 - 2 and ends with its EOS
    assert score.bytes == sum(int(token) % 3 + 1 for token in documents[-1][1:-1])


LENGTH = 24


def hf_model(family: str, vocabulary: int):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    if family == "bloom":
        sizes = {"vocab_size": vocabulary, "hidden_size": 24, "n_layer": 2, "n_head": 3, "seq_length": LENGTH}
        model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).eval()
    else:
        sizes = {
            "vocab_size": vocabulary,
            "n_positions": LENGTH,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "n_inner": 40,
        }
        model = transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)  # attention far from uniform, losses far from each other
    return model


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of three scripts and code, the shortest a single token, so that boundaries fall everywhere in the
    windows."""
    return [
        SENTENCES["fi"],
        "a",
        SENTENCES["hi"],
        SENTENCES["code"],
        SENTENCES["ja"],
        "x = 1",
        SENTENCES["en"],
        SENTENCES["vi"],
    ]


@pytest.fixture(scope="module", params=["gpt_bigcode", "bloom"])
def family(request, texts, mini_tokenizer, tmp_path_factory):
    """By `transformers` alone: for each window and mode, (nats, bytes) of the tokens that are predicted. And our model
    and store."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("family")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(mini_tokenizer / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(mini_tokenizer)
    model = hf_model(request.param, tokenizer.vocab_size)
    model.save_pretrained(folder / "hf")
    assert convert(["from-torch", str(folder / "hf"), str(folder / "ours")]) == 0

    stream = []  # (id, document, its bytes, whether it is the document's end)
    for number, text in enumerate(texts):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        sizes = [
            len(token) for token in theirs.convert_ids_to_tokens(ids)
        ]  # a character of a byte-level token is a byte
        assert sum(sizes) == len(text.encode())
        stream += [(i, number, size, False) for i, size in zip(ids, sizes, strict=True)] + [
            (tokenizer.eos_id, number, 0, True)
        ]

    def parts(window: list, across: bool) -> list[list]:
        numbers = sorted({number for _, number, _, _ in window})
        return [window] if across else [[token for token in window if token[1] == number] for number in numbers]

    def measured(across: bool, start: int) -> tuple[float, int]:
        nats, size = 0.0, 0
        for part in parts(stream[start : start + LENGTH + 1], across):
            with torch.inference_mode():
                logits = model(torch.tensor([[token[0] for token in part]][:LENGTH])[:, :LENGTH]).logits[0].double()
            for place, (target, _, target_size, is_end) in enumerate(part[1:]):
                if not is_end:
                    nats -= float(torch.log_softmax(logits[place], dim=0)[target])
                    size += target_size
        return nats, size

    starts = range(0, len(stream) - 1, LENGTH)
    expected = {across: [measured(across, start) for start in starts] for across in (True, False)}
    documents = [np.append(tokenizer.encode(text), tokenizer.eos_id) for text in texts]
    store = make_store(
        folder / "store",
        documents,
        text_bytes=sum(len(text.encode()) for text in texts),
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        eos_id=tokenizer.eos_id,
    )
    config = checkpoint.read_metadata(folder / "ours").config
    parameters = restore_parameters(folder / "ours")
    return expected, partial(evaluate, config, parameters, store, tokenizer, batch_size=4, length=LENGTH)


@pytest.mark.parametrize("across", [True, False])
def test_bits_per_byte_of_a_text_are_those_of_transformers(family, texts, across):
    """All of the text, and the windows of a quick evaluation. What is left out is the text's first token, or that of
    every document."""
    expected, ours = family
    apart, together = (nats / size for nats, size in (np.sum(expected[each], axis=0) for each in (False, True)))
    assert abs(apart / together - 1) > 1e-3  # the masks matter by more than the tolerance
    nats, size = np.sum(expected[across], axis=0)
    score = ours(across=across)
    assert score.bytes == pytest.approx(size)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert 0 < sum(len(text.encode()) for text in texts) - size < (5 if across else 5 * len(texts))

    windows = len(expected[across])
    chosen = [(2 * i + 1) * windows // 6 for i in range(3)]
    nats, size = np.sum([expected[across][window] for window in chosen], axis=0)
    assert ours(across=across, windows=3).bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_a_better_model_needs_fewer_bits(tmp_path):
    """Uniform logits cost log2(31) bits a token; a head that knows the only token costs next to none."""
    store = make_store(tmp_path / "store", [np.append(np.full(40, 7), 0)], text_bytes=40)
    _structure, parameters = structure_of(CONFIG, FP32), jax.tree.map(jnp.zeros_like, initial_parameters(CONFIG, 0))
    assert evaluate(CONFIG, parameters, store).loss == pytest.approx(math.log(31), rel=1e-6)
    parameters["final_norm"]["bias"] = jnp.ones(16)
    parameters["token_embedding"]["embedding"] = parameters["token_embedding"]["embedding"].at[7].set(2.0)
    assert evaluate(CONFIG, parameters, store).loss < 1e-6
