"""Generation against `transformers`: greedy tokens, cached logits, the candidates of sampling; streams,
prompts, meshes, the command.

B batch, L sequence, V vocabulary.
"""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import run_on_eight_devices
from hypothesis import given
from hypothesis import strategies as st

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.checkpoints.writing import save_checkpoint
from aurora_jax.cli import main
from aurora_jax.data.text.documents import Document, Instruction
from aurora_jax.data.text.tokenizer import tokenizer_from
from aurora_jax.errors import InputError
from aurora_jax.generate import decoding, prompts
from aurora_jax.generate.generator import Completion, Generator, make_inference_mesh, prompt_slots, unstacked_shapes
from aurora_jax.generate.sampling import Sampling, candidates, choose
from aurora_jax.generate.streaming import TextStream
from aurora_jax.model.config import BLOOM, PRESETS, ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters, merge, merge_unstacked, structure_of
from convert.__main__ import main as convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FP32 = ComputeConfig("float32", "float32")
REPOSITORY = Path(__file__).parent.parent
NANO = REPOSITORY / "examples" / "nano"
V, EOS, NEW = 199, 0, 256
LENGTHS = (5, 71, 1, 30)

HF_MODELS = {
    "multi-query": lambda: transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(
            vocab_size=V, n_positions=400, n_embd=48, n_layer=3, n_head=3, n_inner=91, eos_token_id=EOS
        )
    ),
    "multi-head": lambda: transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(
            vocab_size=V, n_positions=400, n_embd=48, n_layer=3, n_head=3, multi_query=False, eos_token_id=EOS
        )
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=V, seq_length=211, hidden_size=48, n_layer=3, n_head=6, eos_token_id=EOS)
    ),
}


@pytest.fixture(scope="module", params=HF_MODELS)
def pair(request, tmp_path_factory):
    """A random `transformers` model, its weights large enough that attention is far from uniform, and our
    config and parameters."""
    torch.manual_seed(1)
    model = HF_MODELS[request.param]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = ("ln_" in name or "layernorm" in name) and name.endswith("weight")
            parameter.normal_(1 if is_scale else 0, 0.15 if is_scale or "wte" in name or "embeddings" in name else 0.4)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder / "hf")
    assert convert(["from-torch", str(folder / "hf"), str(folder / "ours")]) == 0
    return model, checkpoint.read_metadata(folder / "ours").config, folder / "ours"


def ragged_prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, V, length).tolist() for length in LENGTHS]


def test_256_greedy_tokens_of_ragged_prompts_are_transformers(pair):
    model, _, path = pair
    rows = ragged_prompts()
    ours = [completion.tokens for completion in Generator.from_checkpoint(path, FP32)(rows, NEW)]
    longest = max(LENGTHS)
    tokens = torch.tensor([[EOS] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    model.generation_config.eos_token_id = None  # `min_new_tokens` would forbid the token instead
    with torch.inference_mode():
        theirs = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=EOS)[
            :, longest:
        ].tolist()
    assert ours == theirs
    assert len({token for row in ours for token in row}) >= 10  # not one token over and over


def test_cached_logits_are_those_without_a_cache(pair):
    """Of every place: the prompt is read at once, what follows token by token, in a row that is padded and
    one that is not."""
    _, config, path = pair
    parameters = restore_parameters(path)
    structure = structure_of(config, FP32)
    L, read, padding = 100, 64, 30
    tokens_BL = np.random.default_rng(0).integers(V, size=(2, L)).astype(np.int32)
    padding_B = np.asarray([0, padding], np.int32)

    @jax.jit
    def uncached(parameters, tokens_BL):
        decoder = merge(structure, parameters)
        return decoder.logits(decoder(tokens_BL))

    @jax.jit
    def cached(parameters, tokens_BL, padding_B):
        decoder, layers = merge_unstacked(structure, parameters)
        hidden_BLD, keys, values = decoding.read(decoder, layers, tokens_BL[:, :read], padding_B)
        keys = tuple(jnp.pad(cache_ZCL, ((0, 0), (0, 0), (0, L - read))) for cache_ZCL in keys)
        values = tuple(jnp.pad(cache_ZLC, ((0, 0), (0, L - read), (0, 0))) for cache_ZLC in values)

        def step(caches, slot):
            token_B1 = jax.lax.dynamic_slice_in_dim(tokens_BL, slot, 1, axis=1)
            hidden_B1D, *caches = decoding.advance(decoder, layers, token_B1, padding_B, *caches, slot=slot)
            return tuple(caches), decoding.last_logits(decoder, hidden_B1D)

        _, later_LBV = jax.lax.scan(step, (keys, values), jnp.arange(read, L))
        first_BLV = decoder.logits(decoder.final_norm(hidden_BLD))
        return jnp.concatenate([first_BLV, jnp.moveaxis(later_LBV, 0, 1)], axis=1)

    whole_1LV = np.asarray(uncached(parameters, tokens_BL[:1]))
    after_padding_1LV = np.asarray(uncached(parameters, tokens_BL[1:, padding:]))
    found_BLV = np.asarray(cached(decoding.unstacked(parameters), tokens_BL, padding_B))
    np.testing.assert_allclose(found_BLV[0], whole_1LV[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found_BLV[1, padding:], after_padding_1LV[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.0, top_k=10),
        Sampling(1.3, top_p=0.6),
        Sampling(0.9, 30, 0.8, 1.4),
        Sampling(1.0, V, 1.0, 0.7),
    ],
)
def test_candidates_are_those_of_transformers(sampling):
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(0, 3, (8, V)).astype(np.float32)
    history_BL = rng.integers(V, size=(8, 40))
    seen_BV = np.zeros((8, V), bool)
    seen_BV[np.arange(8)[:, None], history_BL] = True
    scores_BW, tokens_BW = map(np.asarray, candidates(jnp.asarray(logits_BV), jnp.asarray(seen_BV), sampling))
    found_BV = np.zeros((8, V))
    np.put_along_axis(found_BV, tokens_BW, np.asarray(jax.nn.softmax(scores_BW, axis=-1)), axis=1)

    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        transformers.TemperatureLogitsWarper(sampling.temperature),
        transformers.TopKLogitsWarper(sampling.top_k or V),
        transformers.TopPLogitsWarper(sampling.top_p),
    ]
    scores = torch.tensor(logits_BV)
    for processor in processors:
        scores = processor(torch.tensor(history_BL), scores)
    np.testing.assert_allclose(found_BV, torch.softmax(scores, -1).numpy(), rtol=1e-5, atol=1e-7)


def test_draws_follow_the_candidates():
    logits_BV = jnp.asarray(np.tile(np.log([0.5, 0.2, 0.15, 0.1, 0.05]), (20_000, 1)), jnp.float32)
    drawn_B = np.asarray(
        choose(logits_BV, None, jnp.arange(20_000, dtype=jnp.uint32), jnp.int32(3), Sampling(1.0, top_p=0.8))
    )
    np.testing.assert_allclose(
        np.bincount(drawn_B, minlength=5) / 20_000, np.array([0.5, 0.2, 0.15, 0, 0]) / 0.85, atol=0.01
    )


def test_a_row_never_changes_another(pair):
    _, _, path = pair
    generator = Generator.from_checkpoint(path, FP32)
    settings = {"sampling": Sampling(1.0, 50, 0.95, 1.1), "eos_ids": (EOS,)}
    rows = ragged_prompts()
    together = generator(rows, 40, seeds=[7, 8, 9, 10], **settings)
    assert together == generator(rows, 40, seeds=[7, 8, 9, 10], **settings)
    assert generator([rows[1], rows[0]], 40, seeds=[8, 7], batch_size=4, **settings) == [together[1], together[0]]
    other = generator(rows, 40, seeds=[11, 8, 9, 10], **settings)
    assert other[1:] == together[1:]
    assert other[0] != together[0]
    # Nor does a row's own limit change what it writes until then, or what others write.
    limits = [40, 3, 17, 1]
    for completion, whole, limit in zip(
        generator(rows, limits, seeds=[7, 8, 9, 10], **settings), together, limits, strict=True
    ):
        assert completion.tokens == whole.tokens[:limit]
        assert completion.finish_reason == ("length" if len(whole.tokens) >= limit else whole.finish_reason)


def test_rows_that_pad_the_vocabulary_are_never_drawn(pair, tmp_path):
    _, _, path = pair
    hf = path.parent / "hf"
    assert convert(["from-torch", str(hf), str(tmp_path / "padded"), "--vocabulary-divisible-by", "64"]) == 0
    padded, rows = Generator.from_checkpoint(tmp_path / "padded", FP32), ragged_prompts()
    assert padded(rows, 20) == Generator.from_checkpoint(path, FP32)(rows, 20)
    wild = padded(rows, 100, sampling=Sampling(1e3, repetition_penalty=1.5))
    drawn = {token for completion in wild for token in completion.tokens}
    assert max(drawn) < V
    assert len(drawn) > V / 2


def test_prompts_are_padded_to_few_lengths():
    padded = [prompt_slots(range(length)) for length in range(1, 8_193)]
    assert all(slots % 64 == 0 and length <= slots < length + 64 + length / 8 for length, slots in enumerate(padded, 1))
    assert padded[:1_024] == [-(-length // 64) * 64 for length in range(1, 1_025)]
    assert (padded[-1], len(set(padded[:2_048])), len(set(padded))) == (8_192, 24, 40)


def test_end_of_text_listeners_and_chunks(pair):
    """Whatever the number of steps between two looks, rows get the same tokens, and each ends where it should."""
    _, _, path = pair
    generator = Generator.from_checkpoint(path, FP32)
    rows = ragged_prompts()
    free = [completion.tokens for completion in generator(rows, 50)]
    eos = free[0][20]
    whole = generator(rows, 50, eos_ids=(eos,))
    for tokens, completion in zip(free, whole, strict=True):
        ends = tokens.index(eos) if eos in tokens else 50
        assert completion.tokens == tokens[:ends]
        assert completion.finish_reason == ("eos" if eos in tokens else "length")
    for every in (1, 7, None):
        heard: list[list[int]] = [[] for _ in rows]

        def listen(row, tokens, heard=heard):
            heard[row] += tokens
            return row == 1 and len(heard[1]) >= 9

        completions = generator(rows, 50, eos_ids=(eos,), listener=listen, every=every)
        if len(whole[1].tokens) >= 9:
            assert completions[1].finish_reason == "stop"
            assert completions[1].tokens == heard[1] == whole[1].tokens[: len(heard[1])]
        assert [completions[row] for row in (0, 2, 3)] == [whole[row] for row in (0, 2, 3)]
        assert [heard[row] for row in (0, 2, 3)] == [whole[row].tokens for row in (0, 2, 3)]


def test_on_every_mesh_as_on_one_device():
    done = run_on_eight_devices(Path(__file__).with_name("generate_on_a_mesh.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(": equal") == 10


def test_a_mesh_that_the_model_cannot_be_divided_over():
    devices = jax.devices() * 6
    assert make_inference_mesh(PRESETS["starcoderplus"], devices).shape == {"fsdp": 1, "tensor": 6}
    assert make_inference_mesh(replace(PRESETS["starcoderplus"], vocabulary_size=49_153), devices).shape == {
        "fsdp": 6,
        "tensor": 1,
    }
    with pytest.raises(InputError, match="cannot be divided over 4 of 6 devices"):
        make_inference_mesh(PRESETS["starcoderplus"], devices, 4)


@pytest.mark.parametrize("config", [PRESETS["starcoderplus"], ModelConfig(64, 8, 64, 2, 8, 128, **BLOOM)])
def test_a_cached_token_takes_the_bytes_of_its_heads(config):
    """20 KiB in bf16 for StarCoderPlus: one key/value head of 128 in each of 40 layers."""
    compute = ComputeConfig()
    settings = {"slots": 1_000, "new_tokens": 1, "sampling": Sampling(), "eos_ids": ()}
    parameters = unstacked_shapes(config, "bfloat16")
    dtypes = ("int32", "uint32", "int32", "bool")
    rows = [jax.ShapeDtypeStruct((1, 64), "int32"), *(jax.ShapeDtypeStruct((1,), dtype) for dtype in dtypes)]
    structure = structure_of(config, compute)
    state = jax.eval_shape(lambda *arguments: decoding.prefill(structure, *arguments, **settings), parameters, *rows)
    stored = sum(cache.size * cache.dtype.itemsize for cache in (*state.keys, *state.values))
    assert stored / 1_000 == config.layers * 2 * config.kv_heads * config.head_dim * 2
    if config.multi_query:
        assert stored / 1_000 == 20 * 1024


NANO_TOKENIZER = tokenizer_from(NANO)


@given(
    text=st.text(alphabet="abcé日本€\n# SToP", max_size=60),
    stop=st.lists(st.sampled_from(["STOP", "\n\n", "日本", "SS", "oP"]), max_size=2, unique=True),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=60),
)
def test_a_stream_shows_whole_characters_up_to_the_first_stop_string(text, stop, cuts):
    tokens = NANO_TOKENIZER.encode(text)
    stream = TextStream(NANO_TOKENIZER, stop)
    shown, start = "", 0
    for cut in cuts * 60:
        if start >= len(tokens) or stream.stopped:
            break
        shown += stream.add(tokens[start : start + cut])
        start += cut
        assert "\ufffd" not in shown
        assert text.startswith(shown)
    shown += stream.rest()
    assert shown == text[: min([text.find(word) for word in stop if word in text], default=len(text))] == stream.text


def test_prompts_are_what_models_were_trained_on():
    special = NANO_TOKENIZER.special_id
    infilling = prompts.infilling(NANO_TOKENIZER, "def f(", "return 1")
    assert infilling.tokens == [
        special("<fim_prefix>"),
        *NANO_TOKENIZER.encode("def f("),
        special("<fim_suffix>"),
        *NANO_TOKENIZER.encode("return 1"),
        special("<fim_middle>"),
    ]
    trained = Instruction()(Document((), {"instruction": "Say hei.", "response": "Hei!"})).pieces
    assert NANO_TOKENIZER.decode(prompts.instruction(NANO_TOKENIZER, " Say hei.\n").tokens) == trained[0].text
    # Names of special tokens in a user's text are text.
    assert special("<fim_middle>") not in prompts.continuation(NANO_TOKENIZER, "a <fim_middle> b").tokens


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "ours"
    assert convert(["from-torch", str(NANO), str(path), "--dtype", "float32"]) == 0
    return path


def test_the_command_writes_what_transformers_writes(nano, capsys):
    prompt = "def main():\n    return "
    assert main(["generate", str(nano), prompt, "--max-new-tokens", "40"]) == 0
    printed = capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(NANO)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        theirs = model.generate(
            tokens.input_ids, attention_mask=tokens.attention_mask, max_new_tokens=40, do_sample=False, pad_token_id=0
        )
    assert printed == tokenizer.decode(theirs[0, tokens.input_ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_stop_strings_and_standard_input(nano, capsys, monkeypatch):
    assert main(["generate", str(nano), "def main():", "--max-new-tokens", "40"]) == 0
    whole = capsys.readouterr().out
    stop = whole.split()[2]
    typed = "".join(rf"\u{ord(character):04x}" for character in stop)
    assert main(["generate", str(nano), "def main():", "--max-new-tokens", "40", "--stop", typed, "never"]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfdef main():")))
    assert main(["generate", str(nano), "-", "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out == whole


RECORDS = [
    {"prompt": "def main():", "id": 1},
    {"prefix": "def add(a, b):\n", "suffix": "    return total\n"},
    {"instruction": "Sano hei.", "id": "kolme"},
    {"prompt": "Helsinki " * 20},
    {"prompt": "x"},
]


def test_files_of_prompts(nano, tmp_path, capsys):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    settings = ["--max-new-tokens", "16", "--temperature", "1", "--seed", "3", "--input", str(source)]
    command = ["generate", str(nano), *settings, "--batch-size", "2"]
    assert main([*command, "--output", str(output)]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [
        {name: value for name, value in record.items() if name in before}
        for record, before in zip(written, RECORDS, strict=True)
    ] == RECORDS
    assert all(record["finish_reason"] in ("eos", "length") and 0 <= record["new_tokens"] <= 16 for record in written)
    # Neither the batch size nor an interruption in the middle of a line changes a byte.
    expected = output.read_bytes()
    lines = expected.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert main([*command[:-1], "3", "--output", str(output)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command[:-1], "3", "--output", str(output), "--resume"]) == 0
    assert output.read_bytes() == expected
    source.write_text(json.dumps({"prompt": "another"}) + "\n" + "\n".join(map(json.dumps, RECORDS)))
    assert main([*command, "--output", str(output), "--resume"]) == 2
    assert "line 1, is not of the record" in capsys.readouterr().err
    assert output.read_bytes() == expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model of 384 tokens, of which the tokenizer "bytes" has 259; no token is much likelier than another."""
    config = ModelConfig(384, 256, 16, 1, 2, 16)
    path = tmp_path_factory.mktemp("tiny") / "ours"
    save_checkpoint(path, initial_parameters(config, 0), CheckpointMetadata(config, "float32"))
    return path


def generated(source: Path, *arguments: str) -> list[dict]:
    output = source.with_suffix(f".{len(list(source.parent.iterdir()))}.out")
    assert main(["generate", *arguments, "--input", str(source), "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_record_depends_on_its_own_line(tiny, tmp_path, monkeypatch):
    """On its own budget, and the program of its own length: the same text alone and beside a prompt that
    leaves no room."""
    records = [{"prompt": "def main():"}, {"prompt": "x" * 250}, {"prompt": "Helsinki on"}]
    (tmp_path / "alone").write_text(json.dumps(records[0]))
    (tmp_path / "beside").write_text("\n".join(map(json.dumps, records)))
    generator = Generator.from_checkpoint(tiny, FP32)  # once, with the programs that the runs share
    monkeypatch.setattr(Generator, "from_checkpoint", lambda *arguments: generator)
    for settings in (["--temperature", "1", "--seed", str(2**80)], ["--repetition-penalty", "1.5"]):
        common = [str(tiny), "--tokenizer", "bytes", "--batch-size", "2", *settings]
        (alone,), beside = (generated(tmp_path / name, *common) for name in ("alone", "beside"))
        assert beside[0] == alone
        for record in beside:
            assert record["finish_reason"] == "eos" or record["new_tokens"] == 256 - len(record["prompt"])
        assert beside[0]["new_tokens"] > 256 - 250


def test_ids_that_the_tokenizer_lacks_are_never_drawn(tiny, capsys):
    """A model whose rows were padded, or that is run with another's tokenizer."""
    assert (
        main(
            [
                "generate",
                str(tiny),
                "def",
                "--tokenizer",
                "bytes",
                "--temperature",
                "5",
                "--max-new-tokens",
                "200",
                "--seed",
                "1",
            ]
        )
        == 0
    )
    assert len(capsys.readouterr().out) > 20


def test_new_tokens_counts_what_is_in_the_completion(nano, tmp_path, monkeypatch):
    """Of 32 tokens that came at once, those behind the stop string do not count."""
    text = "one two three, four five six"
    tokens = NANO_TOKENIZER.encode(text)

    def generator(prompts, limits, *, listener, **settings):
        return [Completion(tokens, "stop" if listener(row, tokens) else "length") for row in range(len(prompts))]

    monkeypatch.setattr(Generator, "from_checkpoint", lambda *arguments: generator)
    (tmp_path / "in").write_text(json.dumps({"prompt": "a"}))
    for stop, completion in ((", f", "one two three"), ("w", "one t"), ("o", ""), ("x ", text)):
        (record,) = generated(tmp_path / "in", str(nano), "--stop", stop)
        counts = [
            count for count in range(len(tokens) + 1) if NANO_TOKENIZER.decode(tokens[:count]).startswith(completion)
        ]
        assert (record["completion"], record["new_tokens"]) == (completion, min(counts))


def test_standard_input_that_is_no_text(nano, capsys, monkeypatch):
    monkeypatch.setattr(Generator, "from_checkpoint", None)
    for stdin, message in ((io.TextIOWrapper(io.BytesIO(b"a\xff")), "cannot be read as UTF-8"), (None, "is closed")):
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["generate", str(nano), "-"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


REFUSED = {
    "no prompt": ([], "Give one prompt"),
    "two prompts": (["a", "--instruct", "b"], "Give one prompt"),
    "empty prompt": ([""], "prompt is empty"),
    "empty instruction": (["--instruct", " "], "instruction is empty"),
    "empty gap": (["--prefix", ""], "both empty"),
    "too long": (["a", "--max-new-tokens", "256"], "1 tokens; with 256 new ones that is 257.*only 256 positions"),
    "no tokens": (["a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "temperature": (["a", "--temperature", "-1"], "temperature is -1"),
    "temperature that is none": (["a", "--temperature", "nan"], "temperature is nan"),
    "endless temperature": (["a", "--temperature", "inf"], "temperature is inf"),
    "temperature that overflows": (["a", "--temperature", "1e-40"], "temperature is 1e-40"),
    "top-p that is none": (["a", "--top-p", "nan"], "top_p is nan"),
    "top-p above 1": (["a", "--top-p", "1.1"], "top_p is 1.1"),
    "penalty that is none": (["a", "--repetition-penalty", "nan"], "repetition_penalty is nan"),
    "seed": (["a", "--seed", "-1"], "--seed is -1: it must be 0 or more"),
    "no UTF-8": (["a\udcff"], "the text must be UTF-8"),
    "no UTF-8 in a stop string": (["a", "--stop", "\udcff"], "the text must be UTF-8"),
    "escape": (["a", "--stop", r"\q"], r"\\q is no escape"),
    "half an escape": (["a", "--stop", "x", r"\x4"], r"\\x is no escape"),
    "top-p": (["a", "--top-p", "0"], "top_p is 0"),
    "top-k": (["a", "--top-k", "-5"], "top_k is -5"),
    "penalty": (["a", "--repetition-penalty", "0"], "repetition_penalty is 0"),
    "stop": (["a", "--stop", ""], "stop string is empty"),
    "tokenizer": (["a", "--tokenizer", "nowhere"], "nowhere"),
    "input alone": (["--input", "x.jsonl"], "needs --output"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(nano, capsys, monkeypatch, case):
    arguments, message = REFUSED[case]
    monkeypatch.setattr(Generator, "from_checkpoint", None)
    assert main(["generate", str(nano), *arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


BAD_LINES = {
    "not JSON": ("{", "line 2: not JSON"),
    "a list": ("[]", "line 2: not a JSON object"),
    "no prompt": ('{"text": "a"}', "line 2: one of prompt .* expected, found 'text'"),
    "two prompts": ('{"prompt": "a", "instruction": "b"}', "line 2: one of prompt"),
    "a number": ('{"prompt": 3}', "line 2: its 'prompt' is no string"),
    "empty": ('{"prompt": ""}', "line 2: The prompt is empty"),
    "too long": (json.dumps({"prompt": "a b" * 300}), "line 2: The prompt has .* positions"),
    "half a character": (
        '{"prompt": "a\\ud83d"}',
        r"line 2: its 'prompt' holds half of a surrogate pair \('a\\ud83d'\)",
    ),
    "not UTF-8": ("\udcff", "line 2: not UTF-8"),
    "a name twice": ('{"prompt": "a", "prompt": "b"}', "line 2: a name twice in an object: 'prompt'"),
    "its own completion": (
        '{"prompt": "a", "completion": "b"}',
        "line 2: the record has a field 'completion' of its own.*--result-prefix",
    ),
    "its own tokens": ('{"prompt": "a", "new_tokens": 1}', "line 2: the record has a field 'new_tokens' of its own"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_records_are_named_before_anything_is_loaded(nano, tmp_path, capsys, monkeypatch, case):
    line, message = BAD_LINES[case]
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + line + "\n", errors="surrogateescape")
    monkeypatch.setattr(Generator, "from_checkpoint", None)
    assert (
        main(["generate", str(nano), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")])
        == 2
    )
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (tmp_path / "out.jsonl").exists()


def test_records_come_back_as_they_came(nano, tmp_path):
    """Whatever stands in their strings, and where lines were cut off; results have the names that the user
    chose. An interruption changes no byte."""
    records = [
        {"prompt": "a\u2028b\x85c\x0bd", "completion": "mine", "half": "\ud83d", "n": float("nan")},
        {"finish_reason": None, "prompt": "b", "new_tokens": [], "\udc00": "\x1c\u2029"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") for record in records]
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    command = [
        "generate",
        str(nano),
        "--max-new-tokens",
        "3",
        "--input",
        str(source),
        "--output",
        str(output),
        "--result-prefix",
        "new_",
    ]
    assert main(command) == 0
    written = output.read_bytes().decode().split("\n")
    assert written.pop() == ""
    for line, record in zip(written, records, strict=True):
        found = json.loads(line)
        assert set(found) - set(record) == {"new_completion", "new_finish_reason", "new_new_tokens"}
        assert json.dumps({name: found[name] for name in record}) == json.dumps(record)
    expected = output.read_bytes()
    for length in (expected.index(b"\n") + 9, len(expected) - 1):  # within a line, and before its end
        output.write_bytes(expected[:length])
        assert main([*command, "--resume"]) == 0
        assert output.read_bytes() == expected


def test_a_file_that_is_not_the_commands_is_not_touched(nano, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Generator, "from_checkpoint", None)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    for content, message in (
        ('{"prompt": "a"}\n', "has no field 'completion'"),
        ('{"prompt": "a"}\n{"pro', "has no field 'completion'"),
    ):
        (tmp_path / "out.jsonl").write_text(content)
        assert (
            main(
                [
                    "generate",
                    str(nano),
                    "--input",
                    str(tmp_path / "in.jsonl"),
                    "--output",
                    str(tmp_path / "out.jsonl"),
                    "--resume",
                ]
            )
            == 2
        )
        assert message in " ".join(capsys.readouterr().err.split())
        assert (tmp_path / "out.jsonl").read_text() == content


def test_what_is_no_checkpoint(tmp_path, capsys):
    assert main(["generate", str(NANO), "a"]) == 2
    assert "Hugging Face folder: make a checkpoint of it" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "a"]) == 2
    assert "neither a checkpoint" in capsys.readouterr().err
    parameters = initial_parameters(ModelConfig(64, 8, 16, 1, 2, 16), 0)
    metadata = CheckpointMetadata(ModelConfig(64, 8, 16, 1, 2, 16), "float32")
    save_checkpoint(tmp_path / "bare", parameters, metadata)
    assert main(["generate", str(tmp_path / "bare"), "a"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
