"""Aurora-M's sources and mixtures, held against what is known of Aurora-M and against files in the layouts
that the hub has."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from aurora_jax.cli import main
from aurora_jax.data.batches.loader import stage_over
from aurora_jax.data.batches.mixture import BlockMixture, block_size_for, left_out
from aurora_jax.data.batches.store import read_info
from aurora_jax.data.corpora.aurora_m.rates import MIXTURES, MOST_EPOCHS, SHARES, TOKENS
from aurora_jax.data.corpora.aurora_m.tasks import ENTRIES, aurora_m_tasks
from aurora_jax.data.corpora.catalogue import task_specs
from aurora_jax.data.text.documents import Document, Piece, Rejected
from aurora_jax.data.text.reshaping import BestReplies, Transcript
from aurora_jax.data.text.sources import Bad, Source
from aurora_jax.errors import InputError

# The model card's 24 data set tags, as it has them.
TAGS = """bigcode/the-stack-dedup, JeanKaddour/minipile, OpenAssistant/oasst1, bigscience/xP3,
gorilla-llm/APIBench, laion/Anh, sander-wood/wikimusictext, tanmaylaud/scidcc-instructions, laion/OIG,
maykcaldas/smiles-transformers, rvv-karma/English-Hinglish-TOP, timdettmers/openassistant-guanaco,
HKBU-NLP/Code-Evol-Instruct-OSS, BEE-spoke-data/code_contests_instruct, HuggingFaceH4/ultrachat_200k,
nvidia/HelpSteer, allenai/tulu-v2-sft-mixture, meta-math/MetaMathQA, meta-math/GSM8K_Backward,
NeuroDragon/BuggedPythonLeetCode, nampdn-ai/tiny-bridgedict, allenai/lila,
Muennighoff/natural-instructions, aurora-m/biden-harris-redteam"""
# What card and blog name besides, and by what it is to be recognised.
NAMED = ["refinedweb", "redpajama", "pile", "pseudo-code", "apibench", "ultrachat", "wikipedia", "culturax"]
DOMAINS = ["smiles", "finance", "legal", "debate", "scidcc", "music"]

PLAIN = "An ordinary sentence of a document, with words in it."


def pair(x: str, y: str) -> str:
    return f"### Instruction:\n{x}\n### Response:\n{y}"


MESSAGES = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
CHAT = pair("Why?", "So.") + "\n" + pair("Sure?", "Yes.")
TREE = {
    "message_tree_id": "1",
    "tree_state": "ready_for_export",
    "prompt": {
        "text": "Why?",
        "role": "prompter",
        "lang": "en",
        "replies": [
            {"text": "Worse.", "role": "assistant", "lang": "en", "rank": 1, "replies": []},
            {
                "text": "So.",
                "role": "assistant",
                "lang": "en",
                "rank": 0,
                "replies": [
                    {
                        "text": "Sure?",
                        "role": "prompter",
                        "lang": "en",
                        "rank": None,
                        "replies": [{"text": "Yes.", "role": "assistant", "lang": "en", "rank": 0, "replies": []}],
                    }
                ],
            },
        ],
    },
}
WIKIPEDIA = {"id": "1", "url": "https://...", "title": "Title", "text": PLAIN}
MC4 = {"text": PLAIN, "timestamp": "2020/01/01", "url": "https://...", "source": "mC4"}
XP3 = {"inputs": "Why?", "targets": "So."}
PAIR = pair("Why?", "So.")

# Source: a file of it under the data root, a record with the fields that the data set has, and the document
# that is to come of it.
RECORDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "refinedweb": (
        "tiiuae/falcon-refinedweb/data/train-00000-of-05534-b8fc5348cbe605a5.parquet",
        {"content": PLAIN, "url": "https://...", "dump": "CC-MAIN-2013-20", "segment": "1", "image_urls": []},
        PLAIN,
    ),
    "redpajama_common_crawl": (
        "togethercomputer/RedPajama-Data-1T/common_crawl/2019-30/en_middle_0053.json.gz.dedup.classifier.jsonl.zst",
        {
            "text": PLAIN,
            "pred_label": "__label__wiki",
            "pred_label_prob": 0.4,
            "wiki_prob": 0.4,
            "source": "cc/2019-30/...",
        },
        PLAIN,
    ),
    "redpajama_c4": (
        "togethercomputer/RedPajama-Data-1T/c4/c4-train.00000-of-01024.jsonl",
        {"text": PLAIN, "meta": {"timestamp": "2019-04-25", "source": "c4", "language": "en", "url": "https://..."}},
        PLAIN,
    ),
    "redpajama_arxiv": (
        "togethercomputer/RedPajama-Data-1T/arxiv/arxiv_024de5df-1b7f-447c-8c3a-51407d8d6732.jsonl",
        {
            "text": PLAIN,
            "meta": {"timestamp": "2019", "yymm": "1904", "arxiv_id": "1904.1", "language": "en", "url": "https://..."},
        },
        PLAIN,
    ),
    "redpajama_stackexchange": (
        "togethercomputer/RedPajama-Data-1T/stackexchange/stackexchange.jsonl",
        {
            "text": PLAIN,
            "meta": {"language": "en", "url": "https://...", "timestamp": "2023", "source": "stackexchange"},
        },
        PLAIN,
    ),
    "pile": (
        "monology/pile-uncopyrighted/train/00.jsonl.zst",
        {"text": PLAIN, "meta": {"pile_set_name": "Pile-CC"}},
        PLAIN,
    ),
    "minipile": ("JeanKaddour/minipile/data/train-00000-of-00012-6fbcb5acda05b3c0.parquet", {"text": PLAIN}, PLAIN),
    **{
        f"web_{code}": (f"uonlp/CulturaX/{code}/{code}_part_00000.parquet", MC4, PLAIN)
        for code in ("fi", "hi", "ja", "vi")
    },
    **{
        f"wikipedia_{code}": (
            f"wikimedia/wikipedia/20231101.{code}/train-00000-of-00001.parquet",
            WIKIPEDIA,
            f"Title\n\n{PLAIN}",
        )
        for code in ("en", "fi", "hi", "ja", "vi")
    },
    "oig": (
        "laion/OIG/unified_chip2.jsonl",
        {"text": "<human>: Why?\n<bot>: So.\n<human>: Sure?\n<bot>: Yes.", "metadata": {}},
        CHAT,
    ),
    "oasst1": ("OpenAssistant/oasst1/2023-04-12_oasst_ready.trees.jsonl.gz", TREE, CHAT),
    "pseudo_code_instructions": (
        "mayank31398/pseudo-code-instructions/train.jsonl",
        {"instruction": "def answer(question: str) -> str:", "input": "Why?", "output": "So."},
        pair("def answer(question: str) -> str:\nWhy?", "So."),
    ),
    "apibench": (
        "gorilla-llm/APIBench/huggingface_train.json",
        {
            "code": "###Instruction: Find a model.\n###Output: <<<api_call>>>: load()\n",
            "api_call": "load()",
            "provider": "Hugging Face",
            "api_data": {"domain": "Vision"},
        },
        pair("Find a model.", "<<<api_call>>>: load()"),
    ),
    **{
        f"xp3_{code}": (f"bigscience/xP3/{code}/xp3_wiki_qa_None_train.jsonl", XP3, PAIR)
        for code in ("en", "hi", "vi", "code")
    },
    "anh": ("laion/Anh/data/train.jsonl", {"text": "User: Why? Assistant: So."}, PAIR),
    "natural_instructions": (
        "Muennighoff/natural-instructions/train/task001_quoref_question_generation_train.jsonl",
        {"task_name": "task001", "id": "1", "definition": "Answer.", "inputs": "Why?", "targets": "So."},
        pair("Answer.\nWhy?", "So."),
    ),
    "english_hinglish_top": (
        "rvv-karma/English-Hinglish-TOP/data/train-00000-of-00001.parquet",
        {
            "en": "Call mom",
            "hi_en": "Mom ko call karo",
            "en_parse": "[IN]",
            "hi_en_parse": "[IN]",
            "domain": "calling",
            "generated_by": "human",
        },
        pair("Translate into Hinglish:\nCall mom", "Mom ko call karo"),
    ),
    "openassistant_guanaco": (
        "timdettmers/openassistant-guanaco/openassistant_best_replies_train.jsonl",
        {"text": "### Human: Why?### Assistant: So.### Human: Sure?### Assistant: Yes."},
        CHAT,
    ),
    "code_evol_instruct": (
        "HKBU-NLP/Code-Evol-Instruct-OSS/default/train/0000.parquet",
        {"instruction": "Why?", "output": "So.", "complexity": 1},
        PAIR,
    ),
    "code_contests_instruct": (
        "BEE-spoke-data/code_contests_instruct/hq-python-deduped/train-00000-of-00001.parquet",
        {
            "name": "1283_D",
            "source": 2,
            "difficulty": 10,
            "language": "PYTHON3",
            "text": "### Prompt\n\nSolve it.\n\n### Response\n\n```python3\nprint(1)\n```",
        },
        pair("Solve it.", "```python3\nprint(1)\n```"),
    ),
    "ultrachat_200k": (
        "HuggingFaceH4/ultrachat_200k/data/train_sft-00000-of-00003-a3ecf92756993583.parquet",
        {"prompt": "Why?", "prompt_id": "1", "messages": MESSAGES},
        CHAT,
    ),
    "helpsteer": (
        "nvidia/HelpSteer/train.jsonl.gz",
        {
            "prompt": "Why?",
            "response": "So.",
            "helpfulness": 3,
            "correctness": 3,
            "coherence": 4,
            "complexity": 1,
            "verbosity": 1,
        },
        PAIR,
    ),
    "tulu_v2": (
        "allenai/tulu-v2-sft-mixture/data/train-00000-of-00003-99ee8754042e20d2.parquet",
        {"dataset": "flan_v2", "id": "1", "messages": MESSAGES},
        CHAT,
    ),
    "metamathqa": (
        "meta-math/MetaMathQA/MetaMathQA-395K.json",
        {"type": "GSM_SV", "query": "Why?", "original_question": "Why?", "response": "So."},
        PAIR,
    ),
    "gsm8k_backward": (
        "meta-math/GSM8K_Backward/GSM8K_Backward.jsonl",
        {"question": "Why?", "answer": "So.", "original_question": "Why?", "original_answer": "So."},
        PAIR,
    ),
    "bugged_python_leetcode": (
        "NeuroDragon/BuggedPythonLeetCode/data/train-00000-of-00001.parquet",
        {"bugged_code": "def f(): retrun 1", "original_code": "def f(): return 1", "bug_type": "typo"},
        pair("Find and fix the bug in this Python code:\ndef f(): retrun 1", "def f(): return 1"),
    ),
    "lila": (
        "allenai/lila/iid/train/0000.parquet",
        {"input": "Why?", "output_program": "So.", "output_answer": "So", "split": "train", "dataset": "addsub"},
        PAIR,
    ),
    "biden_harris_redteam": (
        "aurora-m/biden-harris-redteam/train.jsonl",
        {"instruction": "Why?", "response": "So."},
        PAIR,
    ),
    "smiles": (
        "maykcaldas/smiles-transformers/data/train-00000-of-00127.parquet",
        {"text": "CC(=O)Oc1ccccc1C(=O)O", "nHBAcc": 4.0},
        "CC(=O)Oc1ccccc1C(=O)O",
    ),
    "wikimusictext": (
        "sander-wood/wikimusictext/wikimusictext.jsonl",
        {"title": "Air", "artist": "Anon", "genre": "Folk", "description": "A tune.", "music": "X:1\nK:C\nCDE|"},
        "Air (Anon; Folk)\nA tune.\n\nX:1\nK:C\nCDE|",
    ),
    "scidcc": (
        "tanmaylaud/scidcc-instructions/default/train/0000.parquet",
        {"instruction": "Summarise the article.", "input": "Glaciers are melting.", "output": "Ice becomes water."},
        pair("Summarise the article.\nGlaciers are melting.", "Ice becomes water."),
    ),
    "tiny_bridgedict": ("nampdn-ai/tiny-bridgedict/default/train/0000.parquet", {"text": PLAIN}, PLAIN),
    **{
        name: (f"mdel/{name}/part.jsonl", {"text": PLAIN}, PLAIN)
        for name in ("finance", "legal_contracts", "political_debate")
    },
}
CODE = {"stack_python": "python", "stack_markdown": "markdown", "stack_other": "c++"}


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return
    if path.name == "MetaMathQA-395K.json":  # an array; APIBench's .json files hold an object a line
        path.write_text(json.dumps(records))
        return
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pyarrow.Codec("zstd").compress(content, asbytes=True)
    path.write_bytes(content)


def documents(root: Path, task: str) -> Iterator[Document]:
    (spec,) = [spec for spec in aurora_m_tasks(str(root)) if spec.name == task]
    for file in spec.source.files("train"):
        for part in spec.source.parts(file):
            for document in spec.source.read(part):
                assert not isinstance(document, Bad), document
                for step in spec.steps:
                    document = step(document)
                yield document


def test_every_source_that_is_named_is_there():
    origins = {entry.origin for entry in ENTRIES}
    assert {tag.strip() for tag in TAGS.split(",")} <= origins
    everything = " ".join(f"{entry.name} {entry.origin}".lower() for entry in ENTRIES)
    for name in NAMED + DOMAINS:
        assert name in everything
    for kind in ("web", "encyclopedia"):
        assert {entry.language for entry in ENTRIES if entry.kind == kind} == {"en", "fi", "hi", "ja", "vi"}
    assert RECORDS.keys() | CODE.keys() == {entry.name for entry in ENTRIES}
    for entry in ENTRIES:
        assert entry.license
        assert entry.kind in ("web", "code", "encyclopedia", "instruction", "safety", "domain")


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.name in RECORDS], ids=lambda entry: entry.name)
def test_records_as_published_become_documents(entry, tmp_path):
    place, record, expected = RECORDS[entry.name]
    write(tmp_path / place, [record])
    for stage in entry.stages:
        (document,) = documents(tmp_path, entry.task(stage))
        assert document.text == expected
        assert all(piece.learn and not piece.special for piece in document.pieces)
        language = "en" if entry.name == "oasst1" else entry.language
        assert document.fields["language"] == language


@pytest.mark.parametrize("name", CODE)
def test_code_gets_starcoders_format_and_is_filled_in_the_middle(name, tmp_path):
    """Put together again, a document is its code, with or without what CodeFormat puts before it."""
    records = [
        {
            "content": f"def function_{i}():\n    return {i}\n",
            "hexsha": "0",
            "lang": "Python",
            "max_stars_repo_name": "someone/something",
            "max_stars_repo_path": f"src/{i}.py",
            "max_stars_count": None if i % 2 else 55.0,
        }
        for i in range(200)
    ]
    write(tmp_path / f"bigcode/the-stack-dedup/data/{CODE[name]}/data-00000-of-00206.parquet", records)
    filled = 0
    parts = {"<reponame>": 0, "<filename>": 0, "<gh_stars>": 0}
    for record, document in zip(records, documents(tmp_path, f"aurora_{name}"), strict=True):
        text = "".join(piece.text for piece in document.pieces)
        if text.startswith("<fim_prefix>"):
            filled += 1
            psm = re.fullmatch(r"<fim_prefix>(.*)<fim_suffix>(.*)<fim_middle>(.*)", text, re.DOTALL)
            spm = re.fullmatch(r"<fim_prefix><fim_suffix>(.*)<fim_middle>(.*)", text, re.DOTALL)
            if spm:
                text = spm[2] + spm[1]
            elif psm:
                text = psm[1] + psm[3] + psm[2]
        head = r"(<reponame>someone/something)?(<filename>src/\d+\.py)?(<gh_stars>10-100)?"
        match = re.fullmatch(f"{head}(\n)?{re.escape(record['content'])}", text)
        assert match, text
        for token, found in zip(parts, match.groups(), strict=False):
            parts[token] += found is not None
    assert 70 < filled < 130
    assert 20 < parts["<reponame>"] < 65
    assert 20 < parts["<filename>"] < 65
    assert 5 < parts["<gh_stars>"] < 40


def test_second_stage_drops_what_is_mostly_symbols(tmp_path):
    numbers = {"text": "12.5 | 13.7 | 99 % | -- a b " * 5}
    write(tmp_path / "JeanKaddour/minipile/data/train-00000-of-00012.parquet", [numbers])
    assert next(documents(tmp_path, "aurora_minipile")).text == numbers["text"]
    with pytest.raises(Rejected, match="symbols"):
        next(documents(tmp_path, "aurora_minipile_cat"))


def test_only_helpful_answers_and_the_five_languages(tmp_path):
    place, record, _ = RECORDS["helpsteer"]
    write(tmp_path / place, [{**record, "helpfulness": 2}])
    with pytest.raises(Rejected, match="helpfulness"):
        next(documents(tmp_path, "aurora_helpsteer"))
    place, record, _ = RECORDS["oasst1"]
    write(tmp_path / place, [{**record, "prompt": {**record["prompt"], "lang": "ru"}}])
    with pytest.raises(Rejected, match="language"):
        next(documents(tmp_path, "aurora_oasst1"))


# Those that are published in parts for training and others; of xP3 all files are for training.
HELD_OUT = [
    name
    for name, (place, *_) in RECORDS.items()
    if re.search(r"/.*train", place) and not re.match("xp3|anh|pseudo", name)
]


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_part_in_the_same_layout_is_not_read(name, tmp_path):
    place, record, _ = RECORDS[name]
    folder, rest = "/".join(place.split("/", 2)[:2]), place.split("/", 2)[2]
    (entry,) = [entry for entry in ENTRIES if entry.name == name]
    specs = {spec.name: spec for spec in aurora_m_tasks(str(tmp_path))}
    source = specs[entry.task(entry.stages[0])].source
    for other in ("test", "validation"):
        write(tmp_path / other / rest, [record])
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        held_out = tmp_path / folder / rest.replace("train", other)
        held_out.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other / rest).rename(held_out)
    assert source.files("train") == []


def test_transcripts_and_trees():
    def conversation(text: str) -> list:
        document = Transcript("A:", "B:")(Document((Piece(text),)))
        return [(turn["role"], turn["content"]) for turn in document.fields["conversation"]]

    assert conversation("Be kind. A: x A: y B: z") == [("system", "Be kind."), ("user", "x\ny"), ("assistant", "z")]
    with pytest.raises(Rejected, match="no marked turn"):
        conversation("nothing here")
    alone = BestReplies()(Document((), {"tree": {"text": "x", "role": "prompter"}}))
    assert alone.fields["conversation"] == [{"role": "prompter", "content": "x"}]


def test_an_array_of_objects_is_read_and_its_flaws_are_named(tmp_path):
    source = Source({"train": (f"{tmp_path}/*.json",)}, "json")
    (tmp_path / "a.json").write_text('[{"text": "one"}, 2, {"text": "three"}]')
    (file,) = source.files("train")
    one, two, three = [record for part in source.parts(file) for record in source.read(part)]
    assert (one.text, three.text) == ("one", "three")
    assert two == Bad(f"{file.url}, record 1", "not a JSON object", "2")
    for broken in ('[{"text": "o', '{"text": "x"}'):
        (tmp_path / "a.json").write_text(broken)
        with pytest.raises(InputError, match=r"a\.json"):
            list(source.read(source.parts(source.files("train")[0])[0]))


# ---------------------------------------------------------------- Mixtures


def shares(mixture: str, by: str) -> dict[str, float]:
    specs = {spec.name: spec for spec in aurora_m_tasks("/root")}
    result: dict[str, float] = {}
    for task, rate in MIXTURES[mixture].items():
        spec = specs[task]
        key = {
            "kind": spec.kind,
            "language": spec.source.language,
            "kind, language": f"{spec.kind} {spec.source.language}",
            "origin": spec.origin,
            "task": task.removesuffix("_cat"),
        }[by]
        result[key] = result.get(key, 0.0) + rate
    return result


@pytest.mark.parametrize("mixture", MIXTURES)
def test_rates_are_whole_and_fit_the_loader(mixture):
    rates = MIXTURES[mixture]
    assert sum(rates.values()) == pytest.approx(1, abs=1e-12)
    assert min(rates.values()) > 0
    specs = {spec.name: spec for spec in aurora_m_tasks("/root")}
    stage = mixture.removeprefix("aurora_m_")
    assert rates.keys() == {name for name, spec in specs.items() if stage in spec.stages}
    size = block_size_for(list(rates.values()))
    block = BlockMixture(list(rates.values()), key=1, block_size=size)
    np.testing.assert_allclose(block.consumed(4 * size) / (4 * size), list(rates.values()), atol=1 / (4 * size))
    with pytest.raises(InputError, match="block_size"):
        BlockMixture(list(rates.values()), key=1, block_size=size // 2)


def test_a_block_is_only_as_large_as_the_smallest_rate_needs():
    assert block_size_for([1.0]) == block_size_for([0.5, 0.5]) == block_size_for([255, 1]) == 256
    assert block_size_for([256, 1]) == 512
    assert block_size_for([1e6, 1]) == 1 << 20


def test_what_is_known_of_the_stages_holds():
    kinds, more = (shares(mixture, "kind") for mixture in ("aurora_m_cap", "aurora_m_cat"))
    assert more["encyclopedia"] > 2 * kinds["encyclopedia"] > 0  # Wikipedia oversampled
    tasks, later = (shares(mixture, "task") for mixture in ("aurora_m_cap", "aurora_m_cat"))
    assert later["aurora_stack_python"] > 2 * tasks["aurora_stack_python"] > 0
    assert later["aurora_stack_markdown"] > 2 * tasks["aurora_stack_markdown"]
    web, web_later = (shares(mixture, "kind, language") for mixture in ("aurora_m_cap", "aurora_m_cat"))
    assert web_later["web en"] < 0.7 * web["web en"]  # English subsampled
    english, english_later = (shares(mixture, "language") for mixture in ("aurora_m_cap", "aurora_m_cat"))
    assert english_later["en"] < english["en"]
    for replayed in (kinds, more):
        assert replayed["code"] > 0.2
        assert replayed["encyclopedia"] > 0.03
    for mixture in (web, web_later):
        assert all(mixture[f"encyclopedia {language}"] > 0 for language in ("en", "fi", "hi", "ja", "vi"))
    origins, origins_later = (shares(mixture, "origin") for mixture in ("aurora_m_cap", "aurora_m_cat"))
    assert "aurora-m/biden-harris-redteam" not in origins
    assert "aurora-m/biden-harris-redteam" in origins_later
    assert "HuggingFaceH4/ultrachat_200k" in origins_later.keys() - origins.keys()
    assert {"laion/OIG", "gorilla-llm/APIBench", "OpenAssistant/oasst1"} <= origins.keys()
    assert "laion/OIG" not in origins_later
    repeated = {entry.name for entry in ENTRIES if entry.kind == "instruction" and len(entry.stages) == 2}
    assert repeated  # some instructions of the first stage come again


def test_nothing_is_read_too_often_and_groups_keep_their_shares():
    for stage, tokens in TOKENS.items():
        rates = MIXTURES[f"aurora_m_{stage}"]
        for entry in ENTRIES:
            if stage in entry.stages:
                assert rates[entry.task(stage)] * tokens <= MOST_EPOCHS * entry.billions * 1e9 * (1 + 1e-9)
        for group, share in SHARES.items():
            here = sum(rates[entry.task(stage)] for entry in ENTRIES if entry.group == group and stage in entry.stages)
            assert here == pytest.approx(share[stage])


def test_seqios_registry_has_the_mixtures(tmp_path):
    import seqio

    from aurora_jax.data.look.inventory import rates_of
    from aurora_jax.data.registry.tasks import mixture_rates, recipe_of, register
    from aurora_jax.data.registry.vocabulary import vocabulary_from

    register(tmp_path / "nowhere", vocabulary_from("bytes"))
    specs = {spec.name: spec for spec in task_specs(tmp_path / "nowhere")}
    for mixture, rates in MIXTURES.items():
        tasks = seqio.MixtureRegistry.get(mixture).tasks
        assert {task.name for task in tasks} == rates.keys()
        assert mixture_rates(mixture) == tuple(sorted(rates.items())) == rates_of(mixture, "corpus", ())
        for task in tasks:
            assert task.output_features["targets"].add_eos
            recipe = recipe_of(task.name, "train")
            assert recipe.steps == specs[task.name].steps
            assert recipe.reader == specs[task.name].source
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------- The command line


def test_missing_sources_are_named_together_and_can_be_left_out(tmp_path, mini_tokenizer, capsys):
    for name in ("wikipedia_fi", "tulu_v2", "metamathqa"):
        place, record, _ = RECORDS[name]
        write(tmp_path / "root" / place, [record] * 20)
    build = ["data", "build", "aurora_m_cat", "--tokenizer", str(mini_tokenizer), "--data-root", str(tmp_path / "root")]
    build += ["--output", str(tmp_path / "stores"), "--workers", "1"]
    assert main(build) == 2
    said = capsys.readouterr().err
    specs = {spec.name: spec for spec in aurora_m_tasks(str(tmp_path / "root"))}
    there = {"aurora_wikipedia_fi_cat", "aurora_tulu_v2", "aurora_metamathqa"}
    assert f"{len(MIXTURES['aurora_m_cat']) - 3} of {len(MIXTURES['aurora_m_cat'])} tasks are missing" in said
    for task in MIXTURES["aurora_m_cat"]:
        assert (f"  {task}: {specs[task].source.splits['train'][0]}" in said) == (task not in there)
    assert not (tmp_path / "stores").exists()

    assert main([*build, "--skip-missing"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    stores = {task for task in MIXTURES["aurora_m_cat"] if read_info(tmp_path / "stores" / task / "train")}
    assert stores == there
    rates = tuple(sorted(MIXTURES["aurora_m_cat"].items()))
    left = sum(rate for task, rate in rates if task in there)
    assert f"35 of 38 tasks, {1 - left:.1%} of it" in said
    assert f"are {1 / left:.3g} times what they were" in said
    stage = stage_over(stores, "cat", rates, 10)
    assert dict(stage.rates).keys() == there
    realised = BlockMixture([rate for _, rate in stage.rates], key=0, block_size=stage.block_size).rates
    assert [float(rate) for rate in realised] == pytest.approx([rate / left for task, rate in rates if task in there])
    assert left_out("m", rates, MIXTURES["aurora_m_cat"]) == ""
    with pytest.raises(InputError, match="none of its tasks"):
        stage_over((), "cat", rates, 10)
