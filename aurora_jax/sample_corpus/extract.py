"""From files as packages carry them to raw lines of text: help pages, message catalogues, language packs.

A document is a list of raw lines. Markup that separates lines is read here; what remains inside a line is for `clean`.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import struct
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator, Sequence

import polib

DocumentLines = list[str]

MESSAGES_PER_DOCUMENT = 40

_GZIP_MAGIC = b"\x1f\x8b"


_BLOCKS = "p, h1, h2, h3, h4, li, dt, dd"


def libreoffice_help(page: bytes) -> DocumentLines:
    """The paragraphs and headings of one LibreOffice help page."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(page.decode())
    # One sentence names the menus of every system and application; a script shows one. Keep the default,
    # which has no class.
    for variant in tree.css(".switchinline > [class], .switch > [class], #DisplayArea pre"):
        variant.decompose()
    return [node.text() for node in tree.css("#DisplayArea p, #DisplayArea h1, #DisplayArea h2, #DisplayArea h3")]


def html(page: bytes) -> DocumentLines:
    """The paragraphs, headings and list items of any HTML page. Program listings, navigation and indexes are
    left out."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(page.decode(errors="replace"))
    for node in tree.css(
        "pre, nav, script, style, .navheader, .navfooter, .toc, .headerlink, .sphinxsidebar, .related, .footer"
    ):
        node.decompose()
    # Only the innermost: a list item that holds paragraphs would say them twice. (A node's own css() finds
    # the node too.)
    return [node.text() for node in tree.css(_BLOCKS) if len(node.css(_BLOCKS)) == 1]


def mallard(page: bytes) -> DocumentLines:
    """The titles and paragraphs of one Mallard page (GNOME help); an empty document where the XML is broken."""
    try:
        root = ElementTree.fromstring(page)
    except ElementTree.ParseError:
        return []
    parents = {child: parent for parent in root.iter() for child in parent}
    lines = []
    for node in root.iter():
        name = node.tag.rpartition("}")[2]
        parent = parents.get(node)
        # <info> holds credits and link titles, not text of the page.
        if name in ("p", "title") and (
            parent is None or parent.tag.rpartition("}")[2] not in ("info", "credit", "license")
        ):
            lines.append("".join(node.itertext()))
    return lines


_RST_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`")
_RST_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")


def rst(page: bytes) -> DocumentLines:
    """The unindented paragraphs and list items of a reStructuredText page; directives, listings and tables
    are left out."""
    lines = []
    for block in re.split(r"\n\s*\n", page.decode()):
        block = block.strip("\n")
        if block.startswith((" ", "\t", "..", ":", "=", "+-")):
            continue
        text = " ".join(
            line.strip() for line in block.split("\n") if not re.fullmatch(r"([=\-~^\"'#*`+])\1{2,}", line.strip())
        )
        text = _RST_LINK.sub(r"\1", _RST_ROLE.sub(r"\1", text)).replace("``", "").replace("*", "").replace("::", ":")
        lines.append(text)
    return lines


def gettext_messages(catalogue: bytes) -> Iterator[tuple[str, str]]:
    """(English, translation) of each message of a compiled gettext catalogue (.mo), in its order; of plurals
    the first form.

    Raises:
      ValueError: the bytes are no .mo file.
    """
    try:
        entries = polib.mofile(catalogue)
    except OSError as error:
        raise ValueError(f"not a compiled gettext catalogue (.mo): {error}") from error
    for entry in entries:
        translation = entry.msgstr_plural[0] if entry.msgid_plural else entry.msgstr
        if entry.msgid and translation:
            yield entry.msgid, translation


_PO_DEFAULT = re.compile(r'^Default: "(.*)"$', re.MULTILINE)


def po_messages(catalogue: str) -> Iterator[tuple[str, str, str]]:
    """(message id, English, translation) of each translated message of a gettext source (.po), in its order.

    Plone's ids are symbols; the English text then stands in a comment, `#. Default: "..."`. Plurals are left out.
    """
    for entry in polib.pofile(catalogue):
        if entry.translated() and entry.msgid and not entry.msgid_plural:
            default = _PO_DEFAULT.search(re.sub(r"\n(?!Default)", " ", entry.comment))
            yield entry.msgid, default[1] if default else entry.msgid, entry.msgstr


_FLUENT_MESSAGE = re.compile(r"^(?:-?[A-Za-z][\w-]*| +\.[\w-]+) *= ?(.*)$")
_FLUENT_BRAND = re.compile(r"\{ *-[\w-]*(?:brand|product|vendor)[\w-]*(?:\([^)]*\))? *\}")


def fluent_messages(text: str) -> list[str]:
    """The values of a Fluent file (.ftl). Messages that choose between variants (`{ $n -> ...`) are left out."""
    messages: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if match := _FLUENT_MESSAGE.match(line):
            messages.append(match[1])
        elif line.startswith(" ") and messages:
            messages[-1] += " " + line.strip()
        else:
            messages.append("")
    return [_FLUENT_BRAND.sub("Firefox", message) for message in messages if message and "->" not in message]


def property_messages(text: str) -> list[str]:
    """The values of a Java-style .properties file."""
    values = (
        line.partition("=")[2].strip()
        for line in re.split(r"\r\n?|\n", text)
        if "=" in line and not line.startswith(("#", "!"))
    )
    return [re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), value) for value in values if value]


def firefox_messages(xpi: bytes) -> list[str]:
    """All messages of a Firefox language pack, file by file in the order of their names."""
    messages = []
    with zipfile.ZipFile(io.BytesIO(xpi)) as pack:
        for name in sorted(pack.namelist()):
            if name.endswith(".ftl"):
                messages += fluent_messages(pack.read(name).decode(errors="replace"))
            elif name.endswith(".properties"):
                messages += property_messages(pack.read(name).decode(errors="replace"))
    return messages


def chromium_messages(pak: bytes) -> dict[int, str]:
    """Resource id -> message of a Chromium locale pack.

    Version 5: u32 version, u8 encoding (1 = UTF-8), 3 bytes of padding, u16 entries, u16 aliases; then for
    each entry (and one closing
    sentinel) u16 id and u32 offset; then for each alias u16 id and u16 index of the entry that it repeats.
    All little-endian.

    Raises:
      ValueError: another version or encoding.
    """
    version, encoding, entries, aliases = struct.unpack_from("<IB3xHH", pak)
    if (version, encoding) != (5, 1):
        raise ValueError(
            f"a .pak file of version {version}, encoding {encoding}; only version 5 in UTF-8 (encoding 1) is known"
        )
    index = [struct.unpack_from("<HI", pak, 12 + 6 * entry) for entry in range(entries + 1)]
    values = [pak[start:end] for (_, start), (_, end) in itertools.pairwise(index)]
    alias_table = 12 + 6 * (entries + 1)
    by_id = {resource: value for (resource, _), value in zip(index, values, strict=False)}
    for alias in range(aliases):
        resource, entry = struct.unpack_from("<HH", pak, alias_table + 4 * alias)
        by_id[resource] = values[entry]
    return {resource: _pak_text(value) for resource, value in by_id.items()}


def _pak_text(value: bytes) -> str:
    # Whole pages lie between the messages, compressed.
    return (gzip.decompress(value) if value.startswith(_GZIP_MAGIC) else value).decode(errors="replace")


def json_messages(text: bytes) -> dict[str, str]:
    """Key -> message of a flat JSON catalogue, in its order."""
    return {key: value for key, value in json.loads(text).items() if isinstance(value, str)}


def group(messages: Sequence[str]) -> list[DocumentLines]:
    """Consecutive messages gathered into documents of MESSAGES_PER_DOCUMENT."""
    return [
        list(messages[start : start + MESSAGES_PER_DOCUMENT])
        for start in range(0, len(messages), MESSAGES_PER_DOCUMENT)
    ]
