"""Corpora as people who write Python have them - folders, files, texts - laid out as the sample corpus is: a folder
with train/LANGUAGE.jsonl to learn from and heldout/LANGUAGE.jsonl to be measured on."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

from aurora_jax.data.text.tokenizer import Tokenizer
from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines

Corpus: TypeAlias = str | Path | Iterable[str] | Mapping[str, Iterable[str]]
"""A folder or file of JSON lines, texts, or texts by language; see above."""


UNNAMED = "und"
"""Language of texts that come without one."""


class CorpusFolder(NamedTuple):
    """A corpus as it lies on disk."""

    root: str
    train: tuple[str, ...]
    """Languages of its train/."""
    held_out: tuple[str, ...]
    """Languages of its heldout/."""

    def stores(self, tokenizer: Tokenizer) -> str:
        """Where its token stores are: of each tokenizer in a folder of its own."""
        return f"{self.root}/stores/{tokenizer.sha256[:12]}"


def training_text(corpus: Corpus, held_out: Corpus | None, output: Path) -> CorpusFolder:
    """The text of a run; what is not laid out yet is put into the run's folder."""
    text = _laid_out(corpus)
    if text is not None and held_out is None:
        return text
    if text is not None:
        corpus = Path(text.root, "train")
    held_out = () if held_out is None else held_out
    if (measured := _laid_out(held_out)) is not None:
        held_out = Path(measured.root, "heldout")
    return _put(output / "corpus", _files(corpus), _files(held_out))


@contextmanager
def held_out_text(corpus: Corpus) -> Iterator[CorpusFolder]:
    """Text to be measured on; what is not laid out yet is put into a folder that goes afterwards."""
    text = _laid_out(corpus)
    if text is None:
        with tempfile.TemporaryDirectory(prefix="aurora-") as folder:
            yield _put(Path(folder), {}, _files(corpus))
    elif text.held_out:
        yield text
    else:
        raise InputError(
            f"{text.root} has no heldout/LANGUAGE.jsonl: text that was kept away from training. To measure what is in "
            f"it all the same, give {text.root}/train."
        )


def _laid_out(corpus: Corpus) -> CorpusFolder | None:
    """A folder with train/ or heldout/; None for anything else."""
    if not isinstance(corpus, str | Path):
        return None
    root = str(corpus).rstrip("/")
    parts = [tuple(sorted(_languages(Path(root, part)))) for part in ("train", "heldout")]
    return CorpusFolder(str(Path(root).absolute()), *parts) if any(parts) else None


def _languages(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder.glob("*.jsonl"))} if folder.is_dir() else {}


def _files(corpus: Corpus) -> dict[str, Path | list[str]]:
    """Language -> its file, or its texts. Raises InputError if there is nothing."""
    if isinstance(corpus, str | Path):
        path = Path(corpus)
        files = {path.stem: path} if path.is_file() else _languages(path)
        if not files:
            raise InputError(
                f"{path}: no corpus. Give a folder of JSON lines (LANGUAGE.jsonl, or train/ and heldout/ with such "
                "files), one such file, a list of texts, or {language: texts}; aurora.sample_corpus makes one."
            )
        return dict(files)
    texts = corpus if isinstance(corpus, Mapping) else {UNNAMED: corpus}
    found: dict[str, Path | list[str]] = {}
    for language, its_texts in texts.items():
        content = [its_texts] if isinstance(its_texts, str) else list(its_texts)
        wrong = next((text for text in content if not isinstance(text, str)), None)
        if wrong is not None:
            raise InputError(f"texts of {language!r}: {wrong!r:.80} is no string.")
        if content:
            found[language] = content
    return found


def _put(folder: Path, train: Mapping[str, Path | list[str]], held_out: Mapping[str, Path | list[str]]) -> CorpusFolder:
    """Files and texts, laid out as a corpus; what is there already stays untouched."""
    for part, files in (("train", train), ("heldout", held_out)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for language, content in files.items():
            if not re.fullmatch(r"[\w-]+", language):
                raise InputError(f"{language!r} cannot name a language: letters, digits, _ and - can.")
            file = folder / part / f"{language}.jsonl"
            if isinstance(content, Path):
                if not (file.is_symlink() and file.samefile(content)):
                    file.symlink_to(content.absolute())
                continue
            lines = b"".join(json_lines.line_of({"text": text, "language": language}) for text in content)
            if not file.exists() or file.read_bytes() != lines:
                file.write_bytes(lines)
    return CorpusFolder(str(folder.absolute()), tuple(sorted(train)), tuple(sorted(held_out)))
