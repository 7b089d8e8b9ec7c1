"""The sample corpus: each extractor on files in their real formats, the cleaning, and the promises of a built
corpus."""

from __future__ import annotations

import gettext
import hashlib
import io
import json
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
from rich.progress import Progress

from aurora_jax.errors import InputError
from aurora_jax.languages import LANGUAGES, NATURAL
from aurora_jax.sample_corpus import build_sample_corpus, extract, heldout
from aurora_jax.sample_corpus.build import CorpusManifest, build
from aurora_jax.sample_corpus.clean import Deduplicator, clean_line, fingerprint, is_language, prose
from aurora_jax.sample_corpus.code import CodeFile, is_well_documented, npm, standard_library
from aurora_jax.sample_corpus.packages import Package, read_members
from aurora_jax.sample_corpus.packages_table import Collection, PackageSource

SENTENCES = {
    "en": "The document number {} was saved before the window was closed.",
    "fi": "Asiakirja numero {} tallennettiin ennen kuin ikkuna suljettiin.",
    "hi": "विंडो बंद होने से पहले दस्तावेज़ संख्या {} सहेजा गया था।",
    "ja": "ウィンドウを閉じる前に文書番号{}を保存しました。",
    "vi": "Tài liệu số {} đã được lưu trước khi cửa sổ được đóng lại.",
}


def write_pak(messages: dict[int, bytes], aliases: dict[int, int]) -> bytes:
    """A Chromium .pak of version 5; `aliases` maps an id to the index of the entry it repeats."""
    header = struct.pack("<IB3xHH", 5, 1, len(messages), len(aliases))
    start = len(header) + 6 * (len(messages) + 1) + 4 * len(aliases)
    table, body = b"", b""
    for resource, value in messages.items():
        table += struct.pack("<HI", resource, start + len(body))
        body += value
    table += struct.pack("<HI", 0, start + len(body))
    return header + table + b"".join(struct.pack("<HH", *alias) for alias in aliases.items()) + body


def write_mo(messages: dict[str, str], order: str = "<") -> bytes:
    """A compiled gettext catalogue."""
    rows = sorted((key.encode(), value.encode()) for key, value in messages.items())
    start = 28 + 16 * len(rows)
    tables: list[bytes] = []
    body = b""
    for column in (0, 1):
        table = b""
        for row in rows:
            table += struct.pack(f"{order}2I", len(row[column]), start + len(body))
            body += row[column] + b"\0"
        tables.append(table)
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, start)
    return header + tables[0] + tables[1] + body


def test_pak_messages_and_aliases() -> None:
    pak = write_pak({10: "Näytä".encode(), 11: b"Show", 40000: "表示".encode()}, aliases={12: 1})
    assert extract.chromium_messages(pak) == {10: "Näytä", 11: "Show", 40000: "表示", 12: "Show"}


def test_pak_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 4"):
        extract.chromium_messages(struct.pack("<IB3xHH", 4, 1, 0, 0))


@pytest.mark.parametrize("order", ["<", ">"])
def test_gettext_catalogue_is_read_as_the_standard_library_reads_it(order: str) -> None:
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8\n",
        "menu\x04Save": "Tallenna",
        "Open": "Avaa",
        "Untranslated": "",
    }
    catalogue = write_mo(messages, order)
    oracle = gettext.GNUTranslations(io.BytesIO(catalogue))
    assert dict(extract.gettext_messages(catalogue)) == {
        "Save": oracle.pgettext("menu", "Save"),
        "Open": oracle.gettext("Open"),
    }


def test_plural_messages_give_their_first_form() -> None:
    catalogue = write_mo({"%d file\0%d files": "%d tiedosto\0%d tiedostoa"})
    assert list(extract.gettext_messages(catalogue)) == [("%d file", "%d tiedosto")]


def test_po_messages_take_the_english_from_the_default_comment() -> None:
    text = (
        'msgid ""\nmsgstr "header"\n\n'
        '#. Default: "Users can "\n#. Default: "ignored"\nmsgid "label_x"\nmsgstr "A"\n\n'
        '#: a.py:1\nmsgid "Long "\n"text"\nmsgstr ""\n"Pitkä "\n"teksti"\n\n'
        '#, fuzzy\nmsgid "Guess"\nmsgstr "Arvaus"\n\nmsgid "None"\nmsgstr ""\n'
    )
    assert list(extract.po_messages(text)) == [
        ("label_x", "Users can ", "A"),
        ("Long text", "Long text", "Pitkä teksti"),
    ]


def test_help_page_keeps_the_default_of_each_variant_and_no_navigation() -> None:
    page = (
        '<html><body><div id="menu"><p>Navigation</p></div><div id="DisplayArea"><h1>Save &amp; close</h1>'
        '<p class="paragraph">Press <span class="switchinline"><span hidden="true" class="MAC">Command</span>'
        '<span hidden="true" id="default1">Ctrl</span></span>+S now.</p><pre>code</pre></div></body></html>'
    )
    assert extract.libreoffice_help(page.encode()) == ["Save & close", "Press Ctrl+S now."]


def test_html_says_nothing_twice_and_leaves_listings_out() -> None:
    page = (
        b"<h2>Title</h2><ul><li><p>In a paragraph</p></li><li>Alone</li></ul><pre>listing</pre><nav><p>skip</p></nav>"
    )
    assert extract.html(page) == ["Title", "In a paragraph", "Alone"]


def test_mallard_page() -> None:
    page = (
        b'<page xmlns="http://projectmallard.org/1.0/"><info><credit><name>A</name></credit><title '
        b'type="link">Short</title></info>'
        b"<title>Change the <em>clock</em></title><section><p>Open <gui>Settings</gui>.</p></section></page>"
    )
    assert extract.mallard(page) == ["Change the clock", "Open Settings."]
    assert extract.mallard(b"<page><p>broken") == []


def test_rst_leaves_markup_listings_and_directives_out() -> None:
    page = (
        b"Title\n=====\n\nSee :doc:`the guide </guide>` and\n``settings`` in `Django <https://x>`_.\n\n.. "
        b"note::\n\n    Indented.\n"
    )
    assert extract.rst(page) == ["Title", "See the guide and settings in Django."]


def test_firefox_language_pack() -> None:
    pack = io.BytesIO()
    with zipfile.ZipFile(pack, "w") as archive:
        archive.writestr(
            "a.ftl",
            "# note\nopen = Avaa { -brand-short-name }\n    .label = Avaa sivu\nlong =\n    Eka\n    toka\nn "
            "= { $n ->\n *[other] x\n }\n",
        )
        archive.writestr("b.properties", "# note\nclose=Sulje v\\u00e4lilehti\n")
        archive.writestr("c.json", "{}")
    assert [message.strip() for message in extract.firefox_messages(pack.getvalue())] == [
        "Avaa Firefox",
        "Avaa sivu",
        "Eka toka",
        "Sulje välilehti",
    ]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("_File", "File"),
        ("Save &As...", "Save As..."),
        ("~Näytä", "Näytä"),
        ("Tu_losta", "Tulosta"),
        ("ファイル(_F)", "ファイル"),
        ("MAX_FILE_SIZE", "MAX_FILE_SIZE"),
        ("<b>Bold</b> &amp;&nbsp;more\n text", "Bold & more text"),
        ("Open %s in %1$d of %(name)s, {count} or { $x }", "Open … in … of …, … or …"),
        ("About %PRODUCTNAME", "About LibreOffice"),
        ("soft\u00adhyphen\u200b", "softhyphen"),
        ("50% of 100%", "50% of 100%"),
        ("a\u0308iti", "äiti"),
    ],
)
def test_clean_line(raw: str, clean: str) -> None:
    assert clean_line(raw, message=True) == clean


def test_hindi_joiners_survive_cleaning() -> None:
    assert clean_line("क्\u200dष") == "क्\u200dष"


@pytest.mark.parametrize("language", NATURAL)
def test_each_language_is_told_from_the_others(language: str) -> None:
    accepted = [other for other in NATURAL if is_language(SENTENCES[other].format(7), language)]
    assert accepted == [language]


def test_symbols_and_names_of_time_zones_are_no_text() -> None:
    assert not is_language("3.14 + 2.71 = [5.85] / x", "en")
    assert not is_language("अफ्रीका/बमाको", "hi")


def test_duplicates_differ_by_more_than_case_and_punctuation() -> None:
    lines = Deduplicator(barred=["Held out."])
    assert lines.new(["Save the file", "save  the file.", "HELD OUT", "Save the files"]) == [
        "Save the file",
        "Save the files",
    ]
    # Vowel signs carry meaning in Hindi.
    assert fingerprint("कल") != fingerprint("काला")


def test_prose_keeps_whole_sentences_only() -> None:
    sentence = "This sentence is long enough to count as prose and it ends with a full stop."
    assert prose(
        [sentence, "Short one.", sentence[:-1], sentence.replace("long", "…"), "1+2=3; " * 12 + "."], "en"
    ) == [sentence]


def test_documented_python() -> None:
    filler = "x = 1  # a comment that makes the module long enough to be worth reading\n" * 20
    assert is_well_documented(f'"""Module."""\n\ndef f():\n    """Do."""\n\n{filler}')
    assert not is_well_documented(f'"""Module."""\n\ndef f():\n    pass\n\n{filler}')
    assert not is_well_documented(f'"""Module."""\ndef f(:\n{filler}')


def test_standard_library_leaves_tests_tables_and_large_files_out(tmp_path: Path) -> None:
    code = "def function(argument):\n    return argument.method(other)\n" * 10
    (tmp_path / "test").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(code)
    (tmp_path / "test" / "module.py").write_text(code)
    (tmp_path / "table.py").write_text("T = [\n" + "    0x00, 0x01, 0x02, 0x03,\n" * 40 + "]\n")
    (tmp_path / "large.py").write_text(code * 200)
    assert [file.path for file in standard_library(tmp_path)] == ["package/module.py"]


def test_npm_takes_permissive_licences_only(tmp_path: Path) -> None:
    code = "function name (argument) {\n  return argument.method(other)\n}\n" * 6
    for package, license in {
        ".": "Artistic-2.0",
        "node_modules/free": "MIT",
        "node_modules/closed": "UNLICENSED",
    }.items():
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "package.json").write_text(json.dumps({"version": "1.2.3", "license": license}))
        (tmp_path / package / "index.js").write_text(code)
    assert [(file.path, file.license, file.version) for file in npm(tmp_path)] == [
        ("index.js", "Artistic-2.0", "1.2.3"),
        ("node_modules/free/index.js", "MIT", "1.2.3"),
    ]


def test_members_of_a_deb_are_read_in_order_without_unpacking(tmp_path: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not here")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.org>\nDescription: x\n"
    )
    for name in ("b.txt", "a.txt", "c.bin"):
        (tree / name).write_text(name)
    subprocess.run(["dpkg-deb", "--build", str(tree), str(tmp_path / "x.deb")], check=True, capture_output=True)
    members = read_members(tmp_path / "x.deb", r".*\.txt")
    assert [(name, content) for name, _, content in members] == [
        ("a.txt", b"a.txt"),
        ("b.txt", b"b.txt"),
    ]


MINI = Collection(
    train=(
        PackageSource("guide", "html", r"(?P<language>\w+)/.*\.html", "CC0-1.0"),
        PackageSource("program", "mo", r"(?P<language>\w+)/.*\.mo", "MIT", english_from="fi"),
    ),
    aligned=PackageSource("browser", "pak", r"(?P<language>[\w-]+)\.pak", "BSD-3-Clause"),
    minimum_bytes=1_000,
)


def numbered(language: str, number: int) -> str:
    """The same sentence in each language; `number` spelt in letters, so that no two are alike."""
    word = "".join(chr(ord("a") + int(digit)) for digit in str(number))
    return SENTENCES[language].format(word)


@pytest.fixture
def packages(tmp_path: Path) -> list[Package]:
    """Packages with real formats: sentences 0-99 are aligned and so held out; the guide repeats 90-109 of
    them, the program 110-199."""
    files: dict[str, dict[str, bytes]] = {"browser": {}, "guide": {}, "program": {}}
    for language in NATURAL:
        pak = write_pak({number: numbered(language, number).encode() for number in range(100)}, aliases={})
        files["browser"][f"{'en-GB' if language == 'en' else language}.pak"] = pak
        page = "".join(f"<p>{numbered(language, number).upper()}</p>" for number in range(60, 130))
        files["guide"][f"{language}/page.html"] = (page + f"<p>{numbered('en', 500)}</p>").encode()
        if language != "en":
            files["program"][f"{language}/x.mo"] = write_mo(
                {numbered("en", n): numbered(language, n) for n in range(110, 200)}
            )
    made = []
    for name, members in files.items():
        path = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        made.append(Package(name, "1.0", path, path.stat().st_size))
    return made


def code_files() -> list[CodeFile]:
    return [
        CodeFile("cpython", "3", f"package/module{number}.py", "PSF-2.0", f"value = {number % 150}\n" * 9)
        for number in range(200)
    ]


def build_mini(directory: Path, packages: list[Package]) -> CorpusManifest:
    directory.mkdir()
    with Progress(disable=True) as progress:
        return build(directory, "test", MINI, packages, code_files(), progress)


def texts(corpus: Path, split: str, part: str) -> list[str]:
    return [
        json.loads(line)["text"] for line in (corpus / split / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_a_built_corpus_keeps_its_promises(tmp_path: Path, packages: list[Package]) -> None:
    corpus = tmp_path / "corpus"
    manifest = build_mini(corpus, packages)

    for part in LANGUAGES:
        for split in ("train", "heldout", "clean"):
            content = (corpus / split / f"{part}.jsonl").read_bytes()
            assert hashlib.sha256(content).hexdigest() == manifest.sha256[f"{split}/{part}.jsonl"]
            documents = texts(corpus, split, part)
            assert manifest.totals[split][part] == {
                "bytes": sum(len(text.encode()) for text in documents),
                "documents": len(documents),
                "lines": sum(len(text.split("\n")) for text in documents),
            }
    assert CorpusManifest.read(corpus) == manifest

    held_out = {language: [text.split("\n") for text in texts(corpus, "heldout", language)] for language in NATURAL}
    train = {
        language: [line for text in texts(corpus, "train", language) for line in text.split("\n")]
        for language in NATURAL
    }
    numbers = {numbered(language, number): number for language in NATURAL for number in range(100)}
    order = [[numbers[line] for line in document] for document in held_out["en"]]
    assert [len(document) for document in order] == [40, 40]
    for language in NATURAL:
        # The same segments in the same order in every language.
        assert [[numbers[line] for line in document] for document in held_out[language]] == order
        # None of them is trained on, however it is written.
        barred = {line.casefold() for document in held_out[language] for line in document}
        seen = [line.casefold() for line in train[language]]
        assert barred.isdisjoint(seen)
        assert len(set(seen)) == len(seen)
        assert numbered(language, 150).casefold() in seen
        # Whole lines of English were left untranslated.
        assert (numbered("en", 500).casefold() in seen) == (language == "en")
        assert {line for text in texts(corpus, "clean", language) for line in text.split("\n")} <= set(train[language])

    code, held_out_code = texts(corpus, "train", "code"), texts(corpus, "heldout", "code")
    assert held_out_code
    assert set(code).isdisjoint(held_out_code)
    assert len(set(code + held_out_code)) == len(code + held_out_code) == 150


def test_the_same_packages_give_the_same_bytes(tmp_path: Path, packages: list[Package]) -> None:
    build_mini(tmp_path / "first", packages)
    build_mini(tmp_path / "second", packages)
    for path in (tmp_path / "first").rglob("*.json*"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()


def test_too_little_text_is_an_error_that_names_the_missing_package(tmp_path: Path, packages: list[Package]) -> None:
    with pytest.raises(InputError, match=r"training text in 'en'.*not found: guide, program"):
        build_mini(tmp_path / "corpus", packages[:1])


def test_a_damaged_package_is_named(tmp_path: Path, packages: list[Package]) -> None:
    packages[1].path.write_bytes(packages[1].path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"guide-1\.0.*delete it"):
        build_mini(tmp_path / "corpus", packages)


def test_segments_with_placeholders_or_untranslated_are_not_held_out() -> None:
    messages = {language: {key: numbered(language, key) for key in range(3)} for language in NATURAL}
    messages["fi"][0] = messages["en"][0]
    messages["hi"][1] += " $1"
    assert [segment["en"] for segment in heldout.aligned_segments(messages)] == [numbered("en", 2)]


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a sample corpus"):
        build_sample_corpus(tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_complete_corpus_is_reused_and_a_damaged_one_is_not(tmp_path: Path, packages: list[Package]) -> None:
    manifest = build_mini(tmp_path / "corpus", packages)
    assert build_sample_corpus(tmp_path / "corpus") == manifest
    with pytest.raises(InputError, match="--force"):
        build_sample_corpus(tmp_path / "corpus", sources="pypi")
    (tmp_path / "corpus" / "train" / "fi.jsonl").unlink()
    with pytest.raises(InputError, match="--force"):
        build_sample_corpus(tmp_path / "corpus")


@pytest.mark.full
def test_the_real_corpus(tmp_path: Path) -> None:
    manifest = build_sample_corpus(tmp_path / "corpus", sources="debian", cache=tmp_path / "cache")
    for language in NATURAL:
        assert manifest.totals["train"][language]["bytes"] > 1_500_000
        assert manifest.totals["heldout"][language]["lines"] == manifest.totals["heldout"]["en"]["lines"]
        train = {
            fingerprint(line) for text in texts(tmp_path / "corpus", "train", language) for line in text.split("\n")
        }
        held_out = {
            fingerprint(line) for text in texts(tmp_path / "corpus", "heldout", language) for line in text.split("\n")
        }
        assert train.isdisjoint(held_out)
    assert 80_000 <= manifest.totals["heldout"]["en"]["bytes"] <= 120_000
    assert manifest.totals["train"]["code"]["bytes"] > 4_000_000
