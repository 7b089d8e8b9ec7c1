"""Our models in the harness, against its own `HFLM` on the same weights: what others measure is what we measure."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")

import torch
import transformers
from eight_devices import run_on_eight_devices
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from aurora_jax.cli import main
from aurora_jax.errors import InputError
from aurora_jax.evaluate.harness import rows as rows_module
from aurora_jax.evaluate.harness import suites
from aurora_jax.evaluate.harness.model import HarnessModel
from aurora_jax.evaluate.harness.rows import SHAPES, batches_of, lengths_of, rows_of
from aurora_jax.evaluate.harness.run import TASKS, run_tasks, table_of
from aurora_jax.model.attention import EVERYONES
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.mesh import MeshConfig
from convert.from_torch import from_torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("AURORA_SHARED", ROOT.parent / "shared")) / "data" / "evaluation"
FP32 = ComputeConfig("float32", "float32", unroll_layers=True)
NATS_A_TOKEN = 1e-5
SENTENCES = (
    "Kaikki ihmiset syntyvät vapaina ja tasavertaisina.",
    "Tất cả mọi người sinh ra đều được tự do.",
    "すべての人間は、生まれながらにして自由である。",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता",
    "def add(a, b):\n    return a + b\n",
    "All human beings are born free and equal in dignity and rights.",
)


def pairs() -> list[tuple[str, str]]:
    """Contexts and continuations, the traps among them."""
    found = [(sentence[: len(sentence) // 2], sentence[len(sentence) // 2 :]) for sentence in SENTENCES]
    return [
        *found,
        ("", "All human beings"),  # no context
        ("All human ", "beings"),  # spaces at the end of a context
        ("All human   ", " beings"),
        ("The answer is", " A"),  # several of one token, behind one context
        ("The answer is", " B"),
        ("The answer is", " C"),
        ("The answer is", " A"),  # the same again
        ("The answer is A", " or B"),  # begins as another goes on
        ("The ans", "wer is forty-two."),  # a token spans the boundary
        ("unbeliev", "able"),
        ("Kaikki\n", "\n"),
        ("x", " "),
        ("🎉 party ", "🎉🎉"),
        (" ".join(SENTENCES) * 20, " free and equal"),  # longer than the model reads: loses its left
        ("a", " b c d" * 40),
        ("<|endoftext|>", "All"),  # a name of a special token, which is one
        ("All<|endoftext|>", "human"),
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """A folder of `transformers` and our checkpoint of it, of both families."""
    folder = tmp_path_factory.mktemp("models")
    big_code = ROOT / "examples" / "nano"
    bloom = folder / "bloom_torch"
    shutil.copytree(big_code, bloom, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "README.md"))
    vocabulary = json.loads((big_code / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=vocabulary, hidden_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    transformers.BloomForCausalLM(config).save_pretrained(bloom)
    found = {}
    for name, source in (("GPTBigCode", big_code), ("BLOOM", bloom)):
        from_torch(source, folder / name)
        found[name] = source, folder / name
    return found


@pytest.fixture(scope="module", params=["GPTBigCode", "BLOOM"])
def both(models, request) -> tuple[HarnessModel, HFLM]:
    source, checkpoint = models[request.param]
    ours = HarnessModel(checkpoint, batch_tokens=1024, compute=FP32)
    theirs = HFLM(pretrained=str(source), device="cpu", dtype="float32", batch_size=4, max_length=ours.max_length)
    assert theirs.prefix_token_id == ours.prefix_token_id == theirs.eot_token_id == 0  # a real token
    return ours, theirs


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_log_likelihoods_are_the_harness_own(both):
    ours, theirs = both
    requests = instances("loglikelihood", pairs())
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (value, greedy), (their_value, their_greedy) in zip(
        pairs(), found, expected, strict=True
    ):
        tokens = max(1, len(theirs.tok_encode(continuation)))
        assert abs(value - their_value) / tokens < NATS_A_TOKEN, (context[-20:], continuation[:20])
        assert greedy == their_greedy
    assert ours.merged == 0


def test_greedy_is_said_of_what_the_model_would_say(both):
    """The model's own continuation is greedy, and with another last token it is not."""
    ours, theirs = both
    ids = theirs.tok_encode("All human beings are")
    with torch.no_grad():
        own = theirs.model.generate(torch.tensor([ids]), max_new_tokens=5, min_new_tokens=5, do_sample=False)[
            0
        ].tolist()
    own = own[len(ids) :]
    asked = [(None, ids, own), (None, ids, [*own[:-1], (own[-1] + 1) % 1000]), (None, ids, own[:1])]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, False, True]


def test_rolling_log_likelihoods_are_the_harness_own(both):
    ours, theirs = both
    texts = [*SENTENCES, " ".join(SENTENCES) * 12, "a"]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    for text, value, their_value in zip(texts, found, expected, strict=True):
        assert abs(value - their_value) / len(theirs.tok_encode(text)) < NATS_A_TOKEN


def test_completions_are_the_harness_own(both):
    ours, theirs = both
    arguments = {"until": ["\n\n", "."], "max_gen_toks": 24, "do_sample": False}
    contexts = [*(sentence[:20] for sentence in SENTENCES), "def f(x):\n    ", " ".join(SENTENCES) * 20]
    requests = instances("generate_until", [(context, dict(arguments)) for context in contexts])
    requests += instances("generate_until", [("All human", {"until": [], "max_gen_toks": 8})])
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_continuation_that_merges_into_the_context_is_scored(both):
    """The harness hands over no token here, and stops; we score from the first token in which both differ."""
    ours, theirs = both
    merged = None
    for word in ("answer", "human", "beings", "return", "rights", "dignity", "equal", "people", "world", "number"):
        for cut in range(1, len(word)):
            context, continuation = f"the {word[:cut]}", word[cut:]
            if len(theirs.tok_encode(context + continuation)) <= len(theirs.tok_encode(context)):
                merged = context, continuation
    assert merged is not None
    with pytest.raises(AssertionError):
        theirs.loglikelihood(instances("loglikelihood", [merged]), disable_tqdm=True)
    ((value, _),) = ours.loglikelihood(instances("loglikelihood", [merged]), disable_tqdm=True)
    whole, context = theirs.tok_encode("".join(merged)), theirs.tok_encode(merged[0])
    same = next(number for number, (a, b) in enumerate(zip(whole, context, strict=False)) if a != b)
    ((expected, _),) = theirs._loglikelihood_tokens([(None, whole[:same], whole[same:])], disable_tqdm=True)
    assert value == pytest.approx(expected, abs=1e-4)
    assert ours.merged == 1


def test_a_continuation_longer_than_the_model_is_refused(both):
    ours, _ = both
    with pytest.raises(InputError, match="A continuation has"):
        ours.loglikelihood(instances("loglikelihood", [("a", " b" * 2 * ours.max_length)]), disable_tqdm=True)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
def test_rows_are_shared_and_shapes_are_few(share, parts):
    """Every token that is asked for is asked for once, behind the tokens of its own request: of what its place sees."""
    generator = random.Random(0)
    requests = []
    for _ in range(300):
        context = [generator.randrange(4) for _ in range(generator.randrange(1, 90))]
        requests += [(context, [generator.randrange(4) for _ in range(generator.randrange(1, 9))]) for _ in range(3)]
    longest, seen, shapes = 64, {}, set()
    rows = rows_of(requests, longest, share)
    for batch in batches_of(rows, 512, parts, share):
        questions = batch.questions
        (B, L), (U,) = questions.tokens_BL.shape, questions.places_U.shape
        shapes.add((B, L, U))
        for index, request, token in batch.asked:
            assert questions.targets_U[index] == token
            row, place = divmod(int(questions.places_U[index]), L)
            row += index // (U // parts) * (B // parts)
            tokens = questions.tokens_BL[row, : place + 1]
            if share:
                segments = questions.segment_ids_BL[row, : place + 1]
                visible = (segments == EVERYONES) | (segments == segments[-1])
                assert questions.positions_BL[row, : place + 1][visible].tolist() == list(range(visible.sum()))
                tokens = tokens[visible]
            seen.setdefault(request, []).append((tokens.tolist(), token))
    assert len(shapes) <= SHAPES
    assert (
        sum(len(row.tokens) for row in rows) < 0.9 * sum(len(row.tokens) for row in rows_of(requests[::3], longest)) * 3
    )
    for number, (context, continuation) in enumerate(requests):
        tokens = [*context, *continuation][-(longest + 1) :]
        first = len(tokens) - len(continuation)
        assert seen[number] == [(tokens[:place], tokens[place]) for place in range(first, len(tokens))]


@pytest.mark.parametrize("seed", range(20))
def test_lengths_waste_as_little_as_can_be(seed, monkeypatch):
    """Against all ways to choose them."""
    import itertools

    monkeypatch.setattr(rows_module, "SHAPES", 3)
    generator = random.Random(seed)
    lengths = [generator.randrange(1, 64) for _ in range(generator.randrange(1, 30))]

    def tokens(chosen) -> int:
        return sum(min(size for size in chosen if size >= length) for length in lengths)

    sizes = sorted({-(-length // 8) * 8 for length in lengths})
    ways = [
        {*some, sizes[-1]}
        for count in range(3)
        for some in itertools.combinations(sizes[:-1], min(count, len(sizes) - 1))
    ]
    chosen = lengths_of(lengths)
    assert len(chosen) <= 3
    assert tokens(chosen) == min(map(tokens, ways))


ON_EIGHT = """
import json
from aurora_jax.evaluate.harness.model import HarnessModel
from aurora_jax.model.attention import EVERYONES
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.mesh import MeshConfig
fp32 = ComputeConfig("float32", "float32", unroll_layers=True)
asked = json.load(open({asked!r}))
answers = []
for mesh in (MeshConfig(), MeshConfig(fsdp=2, tensor=4), MeshConfig(fsdp=2, sequence=2, tensor=2)):
    model = HarnessModel({checkpoint!r}, batch_tokens=1024, compute=fp32, mesh=mesh)
    answers.append(model._loglikelihood_tokens([(None, *pair) for pair in asked], disable_tqdm=True))
json.dump(answers, open({answers!r}, "w"))
"""


@pytest.mark.full
def test_on_every_mesh_as_on_one_device(models, tmp_path):
    _, checkpoint = models["GPTBigCode"]
    ours = HarnessModel(checkpoint, batch_tokens=1024, compute=FP32)
    asked = [ours._encode_pair(context or "a", continuation) for context, continuation in pairs()]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    paths = {"asked": str(tmp_path / "asked.json"), "answers": str(tmp_path / "answers.json")}
    run_on_eight_devices(ON_EIGHT.format(checkpoint=str(checkpoint), **paths))
    expected = ours._loglikelihood_tokens([(None, *pair) for pair in asked], disable_tqdm=True)
    for answers in json.loads((tmp_path / "answers.json").read_text()):
        np.testing.assert_allclose(
            [value for value, _ in answers], [value for value, _ in expected], rtol=1e-5, atol=1e-4
        )
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]


OWN_TASK = """
task: own_text
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"text": sentence}, ensure_ascii=False) for sentence in SENTENCES]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "own_text.yaml").write_text(OWN_TASK.format(file=folder / "text.jsonl"))
    return folder


def run(checkpoint: Path, tasks: list[str], **others) -> dict:
    settings = {"include_path": None, "task_data": SHARED, "limit": 12, "shots": None, "batch_tokens": 1024}
    return run_tasks(checkpoint, tasks, compute=FP32, mesh=MeshConfig(), **{**settings, **others})


LOCAL = [
    "aurora_xcopa_vi",
    "aurora_jcommonsenseqa",
    "aurora_winograd_en",
    "aurora_winograd_jp",
    "aurora_mgsm_en",
    "aurora_mgsm_ja",
]


@pytest.mark.parametrize("family", ["GPTBigCode", pytest.param("BLOOM", marks=pytest.mark.full)])
def test_every_local_task_has_the_harness_own_figures(models, own_tasks, family, monkeypatch):
    if not SHARED.is_dir():
        pytest.skip(f"no evaluation data at {SHARED}; set AURORA_SHARED")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    source, checkpoint = models[family]
    ours = run(checkpoint, [*LOCAL, "own_text"], include_path=own_tasks)
    manager = TaskManager(
        include_path=[str(TASKS), str(own_tasks)], include_defaults=False, metadata={"data": str(SHARED)}
    )
    length = ours["config"]["model_args"]["max_length"]
    hf = HFLM(pretrained=str(source), device="cpu", dtype="float32", batch_size=4, max_length=length)
    theirs = simple_evaluate(
        hf, tasks=[*LOCAL, "own_text"], limit=12, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    for task in [*LOCAL, "own_text"]:
        for key, value in theirs["results"][task].items():
            if isinstance(value, float) and "stderr" not in key:
                assert ours["results"][task][key] == pytest.approx(value, rel=1e-5, abs=1e-7), (task, key)
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["doc_hash"] == other["doc_hash"]
            if task in LOCAL[4:]:
                assert mine["resps"] == other["resps"]
            elif task in LOCAL:
                assert [greedy for _, greedy in mine["filtered_resps"]] == [
                    greedy for _, greedy in other["filtered_resps"]
                ]


def test_two_models_in_one_table(models, own_tasks):
    """The first is the base; a model against itself gains and loses nothing."""
    if not SHARED.is_dir():
        pytest.skip(f"no evaluation data at {SHARED}; set AURORA_SHARED")
    results = {name: run(models[name][1], ["aurora_xcopa_vi"], limit=50) for name in ("GPTBigCode", "BLOOM")}
    table = table_of({**results, "again": results["GPTBigCode"]})
    assert table["base"] == "GPTBigCode"
    score = table["models"]["GPTBigCode"]["scores"]["aurora_xcopa_vi"]
    assert score["documents"] == 50
    assert score["low"] < score["value"] < score["high"]
    assert score["value"] == pytest.approx(results["GPTBigCode"]["results"]["aurora_xcopa_vi"]["acc,none"])
    against = table["models"]["BLOOM"]["scores"]["aurora_xcopa_vi"]["against_base"]
    other = table["models"]["BLOOM"]["scores"]["aurora_xcopa_vi"]["value"]
    assert against["difference"]["value"] == pytest.approx(other - score["value"])
    assert (against["gained"] - against["lost"]) / 50 == pytest.approx(other - score["value"])
    again = table["models"]["again"]["scores"]["aurora_xcopa_vi"]["against_base"]
    assert (again["gained"], again["lost"], again["difference"]["value"]) == (0, 0, 0)


def test_what_was_answered_is_not_asked_again(models, own_tasks, tmp_path, monkeypatch):
    """A run that dies in the middle keeps what it has."""
    _, checkpoint = models["GPTBigCode"]
    answers = HarnessModel._loaded
    calls = []

    def dying(self):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answers(self)

    (own_tasks / "own_choice.yaml").write_text(
        OWN_TASK.format(file=own_tasks / "text.jsonl")
        .replace("own_text", "own_choice")
        .replace("loglikelihood_rolling", "multiple_choice")
        .replace('doc_to_text: ""', 'doc_to_text: "{{text[:12]}}"')
        .replace('doc_to_target: "{{text}}"', 'doc_to_target: 0\ndoc_to_choice: ["{{text[12:]}}", "{{text[13:]}}"]')
        .replace("bits_per_byte", "acc")
    )
    given = {"include_path": own_tasks, "answers": tmp_path / "answers", "batch_tokens": 64}
    whole = run(checkpoint, ["own_choice"], include_path=own_tasks, batch_tokens=64)
    monkeypatch.setattr(HarnessModel, "_loaded", dying)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, ["own_choice"], **given)
    monkeypatch.setattr(HarnessModel, "_loaded", answers)
    asked = []
    tokens = HarnessModel._loglikelihood_tokens
    monkeypatch.setattr(
        HarnessModel,
        "_loglikelihood_tokens",
        lambda self, requests, **others: asked.append(len(requests)) or tokens(self, requests, **others),
    )
    found = run(checkpoint, ["own_choice"], **given)
    assert 0 < sum(asked) < 12
    assert found["results"]["own_choice"]["acc,none"] == whole["results"]["own_choice"]["acc,none"]


def test_suites_are_tasks_of_the_harness_with_their_shots(models, monkeypatch):
    known = set(TaskManager().all_tasks)
    assert [task for suite in suites.SUITES.values() for task in suite if task not in known] == []
    if not SHARED.is_dir():
        pytest.skip(f"no evaluation data at {SHARED}; set AURORA_SHARED")
    monkeypatch.setitem(suites.SUITES, "local", {"aurora_xcopa_vi": 2, "aurora_winograd_en": 0})
    _, checkpoint = models["GPTBigCode"]
    assert run(checkpoint, ["suite_local"], limit=3)["n-shot"] == {"aurora_xcopa_vi": 2, "aurora_winograd_en": 0}
    assert run(checkpoint, ["suite_local"], limit=3, shots=1)["n-shot"]["aurora_xcopa_vi"] == 1
    with pytest.raises(InputError, match="There is no suite 'suite_sv'; there are suite_en, suite_ja"):
        run(checkpoint, ["suite_sv"])


def test_what_cannot_be_run_is_said_in_a_sentence(models, tmp_path):
    _, checkpoint = models["GPTBigCode"]
    with pytest.raises(InputError, match=r"There is no task 'aurora_xcopa'.*did you mean aurora_xcopa_vi"):
        run(checkpoint, ["aurora_xcopa"])
    with pytest.raises(InputError, match="--task-data"):
        run(checkpoint, ["aurora_xcopa_vi"], task_data=None)
    with pytest.raises(InputError, match="no such file"):
        run(checkpoint, ["aurora_xcopa_vi"], task_data=tmp_path)
    (tmp_path / "xcopa_vi_validation.jsonl").write_text('{"premise": 3}\n{')
    with pytest.raises(InputError, match="not the records that the task reads"):
        run(checkpoint, ["aurora_xcopa_vi"], task_data=tmp_path)


def test_the_command_compares_models_and_converts_what_is_not_ours(models, tmp_path, capsys):
    """A checkpoint and the PyTorch folder that it was made of: one table, and no difference."""
    if not SHARED.is_dir():
        pytest.skip(f"no evaluation data at {SHARED}; set AURORA_SHARED")
    source, checkpoint = models["GPTBigCode"]
    command = ["eval", str(checkpoint), str(source), "--harness", "aurora_xcopa_vi", "--task-data", str(SHARED)]
    command += ["--limit", "20", "--output"]
    assert main([*command, str(tmp_path / "table.json")]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["base"] == str(checkpoint)
    assert set(table["models"]) == {str(checkpoint), str(source)}
    against = table["models"][str(source)]["scores"]["aurora_xcopa_vi"]["against_base"]
    assert (against["difference"]["value"], against["gained"], against["lost"]) == (0, 0, 0)
    assert "detectable" in capsys.readouterr().out
    assert main([command[0], command[1], *command[3:], str(tmp_path / "one.html")]) == 0
    assert "aurora_xcopa_vi" in (tmp_path / "one.html").read_text()
    assert main(["eval", str(checkpoint), str(checkpoint), "--harness", "aurora_xcopa_vi"]) == 2
    assert "A model is named twice" in capsys.readouterr().err
    assert main(["eval", str(checkpoint), str(source), "--corpus", "corpus"]) == 2
    assert "Several models are compared by --harness" in capsys.readouterr().err
    assert main(["eval", str(checkpoint), "--limit", "5"]) == 2
    assert "--limit only go with --harness" in capsys.readouterr().err
    assert main(["eval", str(checkpoint), "--json", "a.json", "--harness", "aurora_xcopa_vi"]) == 2
    assert "--json do not go with --harness" in capsys.readouterr().err
