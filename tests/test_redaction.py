"""Redaction against labels: strings written for this, in six languages and code, of which most must stay as they are.

`tests/pii_labels.jsonl`: `spans` are what has to go, as [start, end, kind]; `kind` is what the string tempts to take it
for. `half` is "rules" (looked at while the rules were written) or "held_out" (not looked at), by the first byte of
sha256(id), or "later" (code, written after the held-out half had been counted once, and before anything was mended).
Some letters of keys are written as escapes, so that no scanner of repositories takes them for real ones.

The tables of docs/curation.md: pytest tests/test_redaction.py -k table -s
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import random
import socket
import string
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from aurora_jax.data.curation import emails, keys, pii

LABELS = [json.loads(line) for line in Path(__file__).with_name("pii_labels.jsonl").read_text("utf-8").split("\n")[:-1]]
UNSEEN = [label for label in LABELS if label["half"] != "rules"]
IN_CODE = [label for label in UNSEEN if label["language"] == "code"]
IN_TEXT = [label for label in UNSEEN if label["language"] != "code"]


def counts_of_spans(labels: Iterable[dict]) -> Counter[str]:
    """True positives, false positives and false negatives: a span counts if its kind and both of its ends are right."""
    counts: Counter[str] = Counter(tp=0, fp=0, fn=0)
    for label in labels:
        wanted = {tuple(span) for span in label["spans"]}
        found = {(finding.start, finding.end, finding.kind) for finding in pii.find(label["text"], label["language"])}
        counts.update(tp=len(wanted & found), fp=len(found - wanted), fn=len(wanted - found))
    return counts


def expected(label: dict) -> str:
    text, names = label["text"], pii.PLACEHOLDERS.get(label["language"], pii.PLACEHOLDERS["en"])
    for start, end, kind in reversed(label["spans"]):
        text = text[:start] + names[kind] + text[end:]
    return text


def counts_of_strings(labels: Iterable[dict]) -> Counter[str]:
    """The same of strings: a changed one is found only if it becomes, byte for byte, what the labels make of it."""
    counts: Counter[str] = Counter(tp=0, fp=0, fn=0)
    for label in labels:
        redacted = pii.redact(label["text"], label["language"])[0]
        if redacted != expected(label):
            counts["fp"] += redacted != label["text"]
            counts["fn"] += bool(label["spans"])
        else:
            counts["tp"] += bool(label["spans"])
    return counts


def ratio(hits: int, others: int) -> str:
    """A share with its Clopper-Pearson interval at 95 %."""
    if not hits + others:
        return "-"
    low, high = binomtest(hits, hits + others).proportion_ci(method="exact")
    return f"{hits / (hits + others):.3f} ({low:.2f} to {high:.2f})"


def test_table():
    groups: list[tuple[str, Callable[[dict], bool]]] = [
        ("text", lambda label: label["language"] != "code"),
        ("code", lambda label: label["language"] == "code"),
    ]
    groups += [
        (name, lambda label, name=name: label["language"] == name) for name in ("en", "fi", "de", "hi", "ja", "vi")
    ]
    groups += [
        (f"{kind}, {where}", lambda label, kind=kind, within=within: label["kind"] == kind and within(label))
        for kind in pii.KINDS
        for where, within in groups[:2]
    ]
    lines = []
    for half in ("rules", "held_out", "later"):
        lines.append(
            f"\n{half}\n\n| | strings | that must stay | spans | precision | recall | of strings | of strings |"
        )
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, belongs in groups:
            chosen = [label for label in LABELS if label["half"] == half and belongs(label)]
            if not chosen:
                continue
            spans, strings = counts_of_spans(chosen), counts_of_strings(chosen)
            cells = [len(chosen), sum(not label["spans"] for label in chosen), spans["tp"] + spans["fn"]]
            cells += [ratio(of["tp"], of[error]) for of in (spans, strings) for error in ("fp", "fn")]
            lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    print("\n".join(lines))
    assert len(lines) == 3 * 2 + (2 + 6 + 8) * 2 + 1 + 4


def test_labels_are_what_they_say():
    assert len(LABELS) >= 600
    assert len({label["id"] for label in LABELS}) == len(LABELS)
    assert len({(label["language"], label["text"]) for label in LABELS}) == len(LABELS)
    assert sum(not label["spans"] for label in LABELS) >= len(LABELS) / 2
    assert {label["language"] for label in LABELS} == {"en", "fi", "de", "hi", "ja", "vi", "code"}
    for label in LABELS:
        if label["half"] != "later":
            assert label["half"] == ("held_out" if hashlib.sha256(label["id"].encode()).digest()[0] % 2 else "rules")


@pytest.mark.parametrize("count", [counts_of_spans, counts_of_strings])
def test_what_rules_were_not_written_on(count):
    in_code, in_text = count(IN_CODE), count(IN_TEXT)
    assert in_code["tp"] >= 0.98 * (in_code["tp"] + in_code["fp"])
    assert in_text["tp"] >= 0.97 * (in_text["tp"] + in_text["fn"])


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("fi", "mailto:⟦office@kunta.fi⟧"),
        ("en", "To:⟦office@firma.com⟧"),
        ("en", "email:⟦sales@firma.com⟧"),
        ("ja", "連絡先:⟦info@firma.jp⟧まで"),
        ("en", "⟦info@firma.com⟧(work)"),
        ("code", "⟦info@firma.com⟧(work)"),
        ("en", "x/⟦info@firma.com⟧"),
        ("de", "⟦straße.büro@firma.de⟧"),
        ("code", "icon@2x.png"),
        ("code", "x@self.weight"),
        ("code", "query@key.mT"),
        ("code", "tokenizer_name = 'bert-base-uncased-2023-v12'"),
        # What real packages and documents showed, beside the labels.
        ("en", "⟦info@firma.com⟧Tel. 09"),
        ("en", "<⟦nick(dot)name(at)firma(dot)fi⟧>"),
        ("code", "by Jos Boumans E<lt>⟦jos.b@cpanel-labs.org⟧E<gt>."),
        ("code", "msg = '⟦pers\\u00f6n@firma.fi⟧'"),
        ("code", "\\u003c⟦info@firma.fi⟧\\u003e"),
        ("code", "ciphers aes128-gcm@openssh.com"),
        ("code", "p(1) + 98172488 * x + 24745250.93"),
        ("code", 'oid = ObjectIdentifier("1.3.101.112")'),
        ("code", "d='M2.12 3.51.98.32 2.03.5'"),
        ("code", 'START = "-----BEGIN RSA PRIVATE KEY-----"\nEND = "-----END RSA PRIVATE KEY-----"'),
        ("code", 'print("-----BEGIN RSA PRIVATE KEY-----")\n' + "the rest of the file\n" * 9),
    ],
)
def test_what_the_issue_and_real_text_showed(language, text):
    wanted = [(match.start() - 2 * n, match[1]) for n, match in enumerate(regex.finditer("⟦(.*?)⟧", text))]
    plain = text.replace("⟦", "").replace("⟧", "")
    assert [(finding.start, plain[finding.start : finding.end]) for finding in pii.find(plain, language)] == wanted


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("address", ["päivi.äyräpää@järvenpää.fi", "phòng.khách@khách-sạn.vn", "कार्यालय@संस्था.भारत"])
def test_composed_and_decomposed_letters_are_one(form, address):
    written = unicodedata.normalize(form, address)
    before, after = unicodedata.normalize(form, "Österbö: "), unicodedata.normalize(form, " ngữ हिन्दी é")
    assert pii.redact(before + written + after, "en")[0] == f"{before}<EMAIL>{after}"


def test_overlapping_kinds_give_one_placeholder():
    assert pii.redact("password=9fK2mQx7Lw4TzR8bVc3N@1.1.1.1 tel:+358401234567@firma.fi", "en")[0].count("<") == 3
    assert pii.redact("<+358401234567@firma.fi>", "en") == ("<+<EMAIL>>", {"EMAIL": 1})


PIECES = st.one_of(
    st.text(alphabet="ab1ä漢か@＠.．-_+/:()<>[] \n%\\$'\"é\u0301", max_size=8),
    st.sampled_from(
        [
            "a.b@firma.fi",
            "ä@漢.jp",
            "+358401234567",
            "host 8.8.8.8",
            "token=9fK2mQx7Lw4TzR8bVc3N",
            "＠firma．ｊｐ",
            "[at]x.org",
        ]
    ),
)


@given(st.lists(PIECES, max_size=6).map("".join), st.sampled_from(list(pii.PLACEHOLDERS)))
def test_what_is_not_found_stays_byte_for_byte(text, language):
    findings = pii.find(text, language)
    assert all(one.end <= following.start for one, following in itertools.pairwise(findings))
    once, names = text, pii.PLACEHOLDERS[language]
    for finding in reversed(findings):
        once = once[: finding.start] + names[finding.kind] + once[finding.end :]
    # What went may have been what kept something else from being found.
    assert pii.redact(text, language)[0] == (pii.redact(once, language)[0] if findings else text)
    assert pii.find(once, language) or pii.redact(text, language)[0] == once


@pytest.mark.parametrize("top_level", ["fi", "org", "museum", "भारत", "xn--h2brj9c", "рф", "中国", "みんな", "COM"])
def test_top_level_domains_are_those_of_the_public_list(top_level):
    assert list(emails.find_addresses(f"x.y@firma.{top_level}", "en")) == [(0, 10 + len(top_level))]
    assert not list(emails.find_addresses(f"x.y@firma.{top_level}{top_level}", "en"))


def test_the_list_comes_with_the_package_and_not_over_the_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    emails._suffixes.cache_clear()
    emails._public_suffix.cache_clear()
    assert emails._public_suffix("firma.co.uk") == "co.uk"
    pinned = Path(__file__).parents[1].joinpath("requirements.txt").read_text()
    assert f"publicsuffixlist=={importlib.metadata.version('publicsuffixlist')}\n" in pinned


@pytest.mark.parametrize("length", [16, 20, 32, 40])
@pytest.mark.parametrize("alphabet", ["ascii", "base64", "url", "hex"])
def test_drawn_values_are_told_from_written_ones(alphabet, length):
    letters = string.ascii_letters + string.digits
    letters = {"ascii": letters, "base64": letters + "+/", "url": letters + "-_", "hex": "0123456789abcdef"}[alphabet]
    draw = random.Random(length)
    found = sum(keys._is_drawn("".join(draw.choices(letters, k=length))) for _ in range(300))
    if alphabet == "hex" and length < 20:  # so short ones are names of things more often
        assert found == 0
    else:
        assert found >= 0.95 * 300


# Every step of the search for addresses is at one sign for "at", and looks at a bounded stretch of text.
# Counted, not timed.
@pytest.mark.parametrize(
    "piece", ["a@", "@", "a.", "a.b@", "a@b.", "[at] ", "a(at)", "x@" + "b." * 9, "a" * 70 + "@", "://", "a@b.c/"]
)
def test_work_grows_with_the_text_and_no_faster(piece, monkeypatch):
    looked_at = Counter[str]()

    class Counting:
        def __init__(self, pattern: regex.Pattern, name: str):
            self.pattern, self.name = pattern, name

        def match(self, text: str, start: int = 0, end: int | None = None) -> regex.Match | None:
            result = self.pattern.match(text, start, len(text) if end is None else end)
            looked_at[self.name] += 1
            looked_at["characters"] += end - start if end is not None else len(result[0]) if result else 1
            return result

        def __getattr__(self, name: str) -> object:
            return getattr(self.pattern, name)

    for name in ("_FROM_AT", "_LOCAL", "_USERINFO", "_IRISH", "_ESCAPE", "_RUN"):
        monkeypatch.setattr(emails, name, Counting(getattr(emails, name), name))
    work = []
    for repeats in (500, 1000, 2000):
        looked_at.clear()
        list(emails.find_addresses(piece * repeats + "@", "en"))
        work.append(sum(looked_at.values()))
    assert work[2] - work[1] <= 2.1 * (work[1] - work[0]) + 100


@pytest.mark.parametrize(
    "piece",
    [
        "a@",
        "@",
        "a.",
        "a@b.",
        "://a:",
        "password=",
        "token1111",
        "-----BEGIN PRIVATE KEY-----\n",
        "+",
        "-eyJaaaaaaaaaa",
        "SG.",
        "1.1 ",
        "::1 ",
    ],
)
def test_processor_time_grows_with_the_text_and_no_faster(piece):
    """Sixteen times the text takes some sixteen times as long: quadratic would be 256 times, nested repeats
    for ever."""

    def seconds(repeats: int) -> float:
        text = "-----BEGIN PRIVATE KEY-----" + piece * repeats + "@"
        times = []
        for _ in range(3):
            begun = time.process_time()
            pii.find(text, "code")
            times.append(time.process_time() - begun)
        return min(times)

    seconds(10)  # tables are loaded at first use
    assert seconds(1024) <= 80 * max(seconds(64), 1e-4)
