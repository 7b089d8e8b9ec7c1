"""Instructions of both stages, and the safety data."""

from aurora_jax.data.corpora.aurora_m.entry import BOTH, CAP, CAT, Entry
from aurora_jax.data.text.documents import Instruction
from aurora_jax.data.text.reshaping import AtLeast, BestReplies, Compose, OneOf, Transcript
from aurora_jax.languages import NATURAL

CHAT = Instruction(conversation="conversation")


def _xp3(language: str, folder: str, billions: float) -> Entry:
    return Entry(
        f"xp3_{folder}", "bigscience/xP3", (f"{folder}/*.jsonl",), "jsonl", language, "instruction", CAP,
        "Apache-2.0", billions, text=None, fields={"instruction": "inputs", "response": "targets"},
        steps=(Instruction(),), note="of the five languages it has en, hi and vi",
    )  # fmt: skip


# fmt: off
INSTRUCTIONS: tuple[Entry, ...] = (
    # ---------------------------------------------------------------- Instructions of the first stage:
    # generic, of lower quality
    Entry(
        "oig", "laion/OIG", ("unified_*.jsonl*",), "jsonl", "en", "instruction", CAP, "Apache-2.0", 8,
        steps=(Transcript("<human>:", "<bot>:"), CHAT),
    ),
    Entry(
        "oasst1", "OpenAssistant/oasst1", ("2023-04-12_oasst_ready.trees.jsonl.gz",), "jsonl", "mul",
        "instruction", BOTH, "Apache-2.0", 0.005, text=None, fields={"tree": "prompt", "language": "prompt.lang"},
        steps=(OneOf("language", NATURAL), BestReplies(), CHAT),
        note="the best ranked thread of each tree, in the five languages: our choice",
    ),
    Entry(
        "pseudo_code_instructions", "mayank31398/pseudo-code-instructions", ("*.jsonl",), "jsonl", "code",
        "instruction", CAP, "Apache-2.0 (memory)", 0.05, text=None,
        fields={"instruction": "instruction", "context": "input", "response": "output"},
        steps=(Instruction(context="context"),),
        note="a GitHub repository; fields (memory): write its prompts as JSON lines of instruction (the "
        "pseudo-code), input, output",
    ),
    Entry(
        "apibench", "gorilla-llm/APIBench", ("*_train.json",), "jsonl", "code", "instruction", BOTH,
        "Apache-2.0 (memory)", 0.005, text="code", steps=(Transcript("###Instruction:", "###Output:"), CHAT),
        note="Gorilla's; lines of torchhub_train.json have no instruction in `code` (memory) and are dropped",
    ),
    _xp3("en", "en", 25),
    _xp3("hi", "hi", 6),
    _xp3("vi", "vi", 4),
    _xp3("code", "code", 2),
    Entry(
        "anh", "laion/Anh", ("**/*.jsonl*",), "jsonl", "mul", "instruction", CAP, "Apache-2.0 (memory)", 1,
        steps=(Transcript("User:", "Assistant:"), CHAT), note="multilingual; layout and markers (memory)",
    ),
    Entry(
        "natural_instructions", "Muennighoff/natural-instructions", ("train/*.jsonl",), "jsonl", "en",
        "instruction", BOTH, "Apache-2.0", 1.5, text=None,
        fields={"instruction": "definition", "context": "inputs", "response": "targets"},
        steps=(Instruction(context="context"),),
    ),
    Entry(
        "english_hinglish_top", "rvv-karma/English-Hinglish-TOP", ("data/train-*.parquet",), "parquet", "hi",
        "instruction", CAP, "Apache-2.0", 0.01, text=None, fields={"english": "en", "response": "hi_en"},
        steps=(Compose("Translate into Hinglish:\n{english}", into="instruction"), Instruction()),
        note="the instruction's wording is ours",
    ),
    # ---------------------------------------------------------------- Instructions of the second stage
    Entry(
        "openassistant_guanaco", "timdettmers/openassistant-guanaco", ("openassistant_best_replies_train.jsonl",),
        "jsonl", "mul", "instruction", CAT, "Apache-2.0 (oasst1's)", 0.005,
        steps=(Transcript("### Human:", "### Assistant:"), CHAT),
        validation=("openassistant_best_replies_eval.jsonl",),
    ),
    Entry(
        "code_evol_instruct", "HKBU-NLP/Code-Evol-Instruct-OSS", ("default/train/*.parquet",), "parquet", "code",
        "instruction", CAT, "not stated (memory)", 0.002, text=None,
        fields={"instruction": "instruction", "response": "output"}, steps=(Instruction(),),
        note="the hub's Parquet conversion (revision refs/convert/parquet); now under CodeResearch; fields (memory)",
    ),
    Entry(
        "code_contests_instruct", "BEE-spoke-data/code_contests_instruct", ("hq-python-deduped/train*",),
        "parquet", "code", "instruction", CAT, "Apache-2.0 (memory), CC-BY-4.0 (CodeContests)", 0.05,
        steps=(Transcript("### Prompt\n", "### Response\n"), CHAT),
        note="which of its configurations Aurora-M read is not known; folder (memory)",
    ),
    Entry(
        "ultrachat_200k", "HuggingFaceH4/ultrachat_200k", ("data/train_sft-*.parquet",), "parquet", "en",
        "instruction", CAT, "MIT", 0.25, text=None, fields={"conversation": "messages"}, steps=(CHAT,),
        validation=("data/test_sft-*.parquet",),
    ),
    Entry(
        "helpsteer", "nvidia/HelpSteer", ("train.jsonl.gz",), "jsonl", "en", "instruction", CAT, "CC-BY-4.0",
        0.01, text=None, fields={"instruction": "prompt", "response": "response", "helpfulness": "helpfulness"},
        steps=(AtLeast("helpfulness", 3), Instruction()), validation=("validation.jsonl.gz",),
        note="answers rated 3 or 4 of 4 for helpfulness: our choice",
    ),
    Entry(
        "tulu_v2", "allenai/tulu-v2-sft-mixture", ("data/train-*.parquet",), "parquet", "en", "instruction", CAT,
        "ODC-By-1.0", 0.2, text=None, fields={"conversation": "messages"}, steps=(CHAT,),
    ),
    Entry(
        "metamathqa", "meta-math/MetaMathQA", ("MetaMathQA-395K.json",), "json", "en", "instruction", CAT, "MIT",
        0.1, text=None, fields={"instruction": "query", "response": "response"}, steps=(Instruction(),),
        note="made of GSM8K's and MATH's training problems: read gains on GSM8K with that in mind",
    ),
    Entry(
        "gsm8k_backward", "meta-math/GSM8K_Backward", ("*.jsonl",), "jsonl", "en", "instruction", CAT,
        "CC-BY-4.0 (memory)", 0.0003, text=None, fields={"instruction": "question", "response": "answer"},
        steps=(Instruction(),),
        note="its only split is called test: leave it out of a run that is judged by it; file (memory)",
    ),
    Entry(
        "bugged_python_leetcode", "NeuroDragon/BuggedPythonLeetCode", ("data/train-*.parquet",), "parquet",
        "code", "instruction", CAT, "not stated (memory)", 0.008, text=None,
        fields={"bugged": "bugged_code", "response": "original_code"},
        steps=(Compose("Find and fix the bug in this Python code:\n{bugged}", into="instruction"), Instruction()),
        note="the instruction's wording is ours; folder (memory)",
    ),
    Entry(
        "lila", "allenai/lila", ("iid/train/*.parquet",), "parquet", "en", "instruction", CAT, "CC-BY-4.0", 0.02,
        text=None, fields={"instruction": "input", "response": "output_program"}, steps=(Instruction(),),
        note="the hub's Parquet conversion (refs/convert/parquet), configuration iid; programs as answers: our choice",
    ),
    # ---------------------------------------------------------------- Safety
    Entry(
        "biden_harris_redteam", "aurora-m/biden-harris-redteam", ("*train*.jsonl",), "jsonl", "en", "safety", CAT,
        "CC-BY-NC-3.0", 0.0015, text=None, fields={"instruction": "instruction", "response": "response"},
        steps=(Instruction(),),
        note="gated; the train split alone, the test split is for evaluation; files and fields (memory)",
    ),
)
# fmt: on
