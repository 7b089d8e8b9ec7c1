"""One source of one package, read and cleaned: the work of one process."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from aurora_jax.languages import NATURAL
from aurora_jax.sample_corpus import extract
from aurora_jax.sample_corpus.clean import clean_line, is_language
from aurora_jax.sample_corpus.heldout import aligned_segments
from aurora_jax.sample_corpus.packages import read_members
from aurora_jax.sample_corpus.packages_table import LANGUAGE_TAGS, PackageSource

_PAGES = {
    "libreoffice-help": extract.libreoffice_help,
    "html": extract.html,
    "mallard": extract.mallard,
    "rst": extract.rst,
}

CATALOGUES = frozenset({"mo", "po", "xpi", "json"})


def read_documents(path: Path, source: PackageSource) -> dict[str, list[extract.DocumentLines]]:
    """Language -> documents of clean lines in that language, in the order of the files' names.

    A page is a document. All messages of a package in one language come as a single document, to be grouped
    when duplicates are gone.
    """
    documents: dict[str, list[extract.DocumentLines]] = defaultdict(list)
    for _, match, content in read_members(path, source.pattern):
        tag = source.language or LANGUAGE_TAGS.get(match["language"])
        if tag is None:
            continue
        if source.kind in _PAGES:
            documents[tag].append(_PAGES[source.kind](content))
            continue
        for language, messages in _messages(content, source, tag).items():
            documents.setdefault(language, [[]])[0].extend(messages)
    message = source.kind in CATALOGUES
    cleaned = {language: [_clean(lines, language, message) for lines in raw] for language, raw in documents.items()}
    return {language: [lines for lines in rows if lines] for language, rows in sorted(cleaned.items())}


def read_aligned(path: Path, source: PackageSource) -> list[dict[str, str]]:
    """The segments of the source that qualify in every language: see `heldout.aligned_segments`.

    Raises:
      ValueError: a catalogue is malformed.
    """
    messages: dict[str, dict[Any, str]] = {language: {} for language in NATURAL}
    for _, match, content in read_members(path, source.pattern):
        language = LANGUAGE_TAGS[match["language"]]
        if source.kind == "pak":
            messages[language].update(extract.chromium_messages(content))
            continue
        for identity, english, translation in extract.po_messages(content.decode()):
            messages["en"][identity] = english
            messages[language][identity] = translation
    return aligned_segments(messages)


def _messages(content: bytes, source: PackageSource, language: str) -> dict[str, list[str]]:
    if source.kind == "xpi":
        return {language: extract.firefox_messages(content)}
    if source.kind == "json":
        return {language: list(extract.json_messages(content).values())}
    if source.kind == "po":
        pairs = [(english, translation) for _, english, translation in extract.po_messages(content.decode())]
    else:
        pairs = list(extract.gettext_messages(content))
    messages = {language: [translation for english, translation in pairs if translation != english]}
    if language == source.english_from:
        messages["en"] = [english for english, _ in pairs]
    return messages


def _clean(lines: extract.DocumentLines, language: str, message: bool) -> extract.DocumentLines:
    cleaned = (clean_line(line, message=message) for line in lines)
    return [line for line in cleaned if is_language(line, language)]
