"""What all tests share: strict JAX, reproducible hypothesis, and a miniature corpus of real sentences with
its tokenizer."""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Small programs run once or twice take longer to be optimised than to run; see OPTIMISED for those that are judged.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # A program is compiled once a session: the workers of pytest-xdist and all processes that tests start inherit this.
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

from aurora_jax.sample_corpus.build import BUILDER, VERSION

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("aurora", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("aurora")

LONGEST = (
    "test_plan",
    "test_train_run",
    "test_divided_step",
    "test_flash_attention",
    "test_generate",
    "test_notebook",
    "test_several_processes",
)
"""Files of tests that take longest, begun first: the last file to end is then a short one, and no worker waits long."""

OPTIMISED = (
    "test_plan",
    "test_plan_on_cpu",
    "test_kernel_cycles",
    "test_flash_attention_on_tpu",
    "test_generate_on_tpu",
    "test_run_on_tpu",
    "test_program",
)
"""Files of tests that judge what a compiler makes of a program: there it does its best, as in a run."""

# Article 1 and 2 of the Universal Declaration of Human Rights, and a function.
SENTENCES = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience.",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu "
    "järki ja omatunto.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "code": "def clamp(value, low, high):\n    return max(low, min(value, high))\n",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [*LONGEST, ""]
    items.sort(key=lambda item: names.index(item.path.stem if item.path.stem in LONGEST else ""))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures of any scope."""
    judged = item.path.stem in OPTIMISED or "plan" in item.name
    jax.config.update("jax_disable_most_optimizations", not judged)


@pytest.fixture(scope="session")
def mini_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder as `aurora data sample` writes it: 40 short documents a language to train on, 4 held out."""
    directory = tmp_path_factory.mktemp("corpus")
    for part, numbers in (("train", range(40)), ("clean", range(20)), ("heldout", range(100, 104))):
        (directory / part).mkdir()
        for language, sentence in SENTENCES.items():
            documents = [
                {"text": f"{number}: {sentence}", "language": language, "source": "test", "license": "none"}
                for number in numbers
            ]
            lines = [json.dumps(document, ensure_ascii=False) for document in documents]
            (directory / part / f"{language}.jsonl").write_text("\n".join(lines) + "\n")
    manifest = {
        "builder": BUILDER,
        "version": VERSION,
        "registry": "tests",
        "held_out": "",
        "totals": {},
        "sources": [],
    }
    (directory / "manifest.json").write_text(json.dumps({**manifest, "sha256": {}}))
    return directory


@pytest.fixture(scope="session")
def mini_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer in StarCoder's layout, trained on the miniature corpus."""
    from aurora_jax.sample_corpus.tokenizer_training import save_tokenizer, train_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(list(SENTENCES.values()) * 5, 400), directory)
    return directory
