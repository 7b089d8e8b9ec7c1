"""A byte-level BPE tokenizer in StarCoder's layout, trained on a sample corpus.

Same special tokens at the same ids, same pre-tokenization, same decoding: what is written for StarCoder's
tokenizer works with this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines
from aurora_jax.storage.atomic import new_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"

# Their position is their id.
SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT,
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
    *("<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>"),
)
BYTES = 256

# StarCoder saw English and code for the most part, and of other languages what strays into code and its
# comments. Bytes of each part.
TRAINING_BYTES: dict[str, int] = {
    "en": 5_300_000,
    "code": 2_800_000,
    "fi": 60_000,
    "hi": 12_000,
    "ja": 90_000,
    "vi": 80_000,
}


@dataclass(frozen=True)
class TrainTokenizerCommand:
    """Train a byte-level BPE tokenizer in StarCoder's layout on a sample corpus."""

    corpus: tyro.conf.Positional[Path]
    """A folder made by `aurora data sample`."""
    out: tyro.conf.Positional[Path]
    """The tokenizer's folder; must not exist."""
    vocabulary_size: int = 4096
    """Entries, the 19 special tokens and 256 bytes among them."""

    def run(self) -> None:
        """Train, write, and print the bytes per token of each language."""
        from rich.console import Console
        from rich.table import Table

        if self.out.exists():
            raise InputError(f"{self.out} exists already; remove it or choose another folder.")
        tokenizer = train_tokenizer(corpus_texts(self.corpus), self.vocabulary_size)
        save_tokenizer(tokenizer, self.out)
        table = Table(
            "part", "bytes per token", title=f"{self.out}: {tokenizer.get_vocab_size():,} entries, on held-out text"
        )
        for part, ratio in bytes_per_token(tokenizer, self.corpus).items():
            table.add_row(part, f"{ratio:.2f}")
        Console().print(table)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: special tokens at ids 0-18, then the 256 bytes, then merges. Equal texts
    give an equal tokenizer.

    Args:
      texts: training text, document by document.
      vocabulary_size: entries in all.

    Raises:
      InputError: the vocabulary is too small for the special tokens and bytes, or the texts are too few to fill it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocabulary_size < len(SPECIAL_TOKENS) + BYTES:
        raise InputError(
            f"a vocabulary of {vocabulary_size} cannot hold {len(SPECIAL_TOKENS)} special tokens and {BYTES} "
            "bytes; ask for more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise InputError(
            f"the texts gave only {tokenizer.get_vocab_size():,} of {vocabulary_size:,} entries; give more "
            "text or a smaller vocabulary."
        )
    return tokenizer


def corpus_texts(corpus: Path) -> Iterator[str]:
    """The training documents of a sample corpus: of each part as many as reach TRAINING_BYTES, evenly spaced
    through its file.

    Raises:
      InputError: a file is missing or is not JSON lines.
    """
    for part, limit in TRAINING_BYTES.items():
        texts = _documents(corpus / "train" / f"{part}.jsonl")
        total = sum(len(text.encode()) for text in texts)
        stride = max(1, round(total / limit))
        yield from texts[::stride]


def bytes_per_token(tokenizer: Tokenizer, corpus: Path) -> dict[str, float]:
    """Part -> bytes of UTF-8 for each token, on the held-out text of a sample corpus."""
    ratios = {}
    for part in TRAINING_BYTES:
        texts = _documents(corpus / "heldout" / f"{part}.jsonl")
        tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
        ratios[part] = sum(len(text.encode()) for text in texts) / tokens
    return ratios


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder that `transformers.AutoTokenizer.from_pretrained` loads; it appears complete or not at all.

    Raises:
      InputError: `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists already; remove it or choose another folder.")
    special: dict[str, object] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    special["additional_special_tokens"] = list(SPECIAL_TOKENS)
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    with new_folder(out) as unfinished:
        tokenizer.save(str(unfinished / "tokenizer.json"), pretty=False)
        _write_json(unfinished / "tokenizer_config.json", config)
        _write_json(unfinished / "special_tokens_map.json", special)


def _documents(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{path} is missing; build the corpus with `python -m aurora_jax data sample`.")
    try:
        return [record["text"] for record in json_lines.read(path)]
    except KeyError:
        raise InputError(f"{path}: a line has no `text`; rebuild the corpus with --force.") from None
    except InputError as error:
        raise InputError(f"{error}; rebuild the corpus with --force.") from None


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
