"""The tasks of Aurora-M's evaluation that the harness has, by language, each with its examples before a document.

Tasks and shots are those of the paper (arXiv 2404.00399, section 5), as its sources name them. What it does not say is
the harness's default. Not here: FIN-bench, JEMHopQA, NIILC and WMT20, which are no tasks of the harness (bring them
with --include-path), and HumanEval and MBPP, whose answers are programs to be run.
"""

PREFIX = "suite_"
"""Before a suite's name, where a task's is asked for."""

SUITES: dict[str, dict[str, int]] = {
    "en": {
        "openbookqa": 8,
        "triviaqa": 8,
        "hellaswag": 8,
        "squadv2": 8,
        "xwinograd_en": 8,
        "gsm8k": 8,
    },
    "ja": {
        "ja_leaderboard_jcommonsenseqa": 4,
        "ja_leaderboard_jsquad": 4,
        "ja_leaderboard_xlsum": 1,
        "mgsm_direct_ja": 4,
    },
    "hi": {"arc_hi": 0, "hellaswag_hi": 0, "m_mmlu_hi": 0, "truthfulqa_hi_mc1": 0, "truthfulqa_hi_mc2": 0},
    "vi": {"arc_vi": 0, "hellaswag_vi": 0, "m_mmlu_vi": 0, "truthfulqa_vi_mc1": 0, "truthfulqa_vi_mc2": 0},
}
"""Language to its tasks, each with the number of examples."""
