"""Redaction of what points at a person or opens a door: e-mail addresses, telephone numbers, IP addresses, keys.

What is found is checked before it goes: addresses by `ipaddress`, numbers by `phonenumbers`. Names of people stay: telling them from other
words takes a model (a hook's work).
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import phonenumbers

Kind = Literal["EMAIL", "PHONE", "IP_ADDRESS", "KEY"]
KINDS: tuple[Kind, ...] = ("EMAIL", "PHONE", "IP_ADDRESS", "KEY")

# What stands in the place of each kind, in the words of the language, so that a model learns to write a placeholder and no address.
PLACEHOLDERS: Mapping[str, Mapping[Kind, str]] = {
    "en": {"EMAIL": "<EMAIL>", "PHONE": "<PHONE_NUMBER>", "IP_ADDRESS": "<IP_ADDRESS>", "KEY": "<KEY>"},
    "fi": {"EMAIL": "<SÄHKÖPOSTI>", "PHONE": "<PUHELINNUMERO>", "IP_ADDRESS": "<IP-OSOITE>", "KEY": "<AVAIN>"},
    "hi": {"EMAIL": "<ईमेल>", "PHONE": "<फ़ोन नंबर>", "IP_ADDRESS": "<आईपी पता>", "KEY": "<कुंजी>"},
    "ja": {"EMAIL": "<メールアドレス>", "PHONE": "<電話番号>", "IP_ADDRESS": "<IPアドレス>", "KEY": "<キー>"},
    "vi": {"EMAIL": "<THƯ ĐIỆN TỬ>", "PHONE": "<SỐ ĐIỆN THOẠI>", "IP_ADDRESS": "<ĐỊA CHỈ IP>", "KEY": "<KHÓA>"},
    "code": {"EMAIL": "<EMAIL>", "PHONE": "<PHONE_NUMBER>", "IP_ADDRESS": "<IP_ADDRESS>", "KEY": "<KEY>"},
}

# Where numbers without a country code are called from. In code only international numbers are looked for: other digits are mostly none.
_REGIONS: Mapping[str, tuple[str, ...]] = {"en": ("US", "GB"), "fi": ("FI",), "hi": ("IN",), "ja": ("JP",), "vi": ("VN",)}

# ASCII only: in Japanese an address touches the words around it.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+\-/:])[A-Za-z0-9](?:[A-Za-z0-9._%+\-]{0,62}[A-Za-z0-9_+\-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9\-(\[])",
)
# RFC 2606 and 6761 reserve these for examples: they are nobody's.
_RESERVED_DOMAIN = re.compile(r"(?:^|[.@])(?:example\.(?:com|net|org|edu)|(?:example|test|invalid|localhost|local))$", re.IGNORECASE)

_IPV4 = re.compile(r"(?<![\w.\-])(?:\d{1,3}\.){3}\d{1,3}(?![\w\-]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]{1,40}(?![\w:])", re.ASCII)
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")  # all that IANA has given out; abc::def in C++ lies elsewhere
_VERSION_BEFORE = re.compile(
    r"(?:\bversions?|\bver|\bv|\breleases?|\brev(?:ision)?|\bbuild|\bfirmware|\bsections?|\bchapters?|\boid|§|[=<>~!^]="
    r"|versio[a-zä]*|phiên bản|संस्करण|バージョン|ヴァージョン|版)[\s:=\"'(]{0,3}$",
    re.IGNORECASE,
)
_ADDRESS_BEFORE = re.compile(
    r"(?:\bip|ipv4|addr|host|server|dns|gateway|peer|inet|netmask|subnet|proxy|nat|://|@)[^\n]{0,16}$", re.IGNORECASE
)
_CONTEXT = 24
# Four small numbers are a version or the number of a section more often than an address; one address in 256 is so small by chance.
_SMALL_OCTET = 64

# Seven digits or more, with what people write between them. Wider digits (Devanagari, full width) are `phonenumbers`' own work.
_PHONE_LIKE = re.compile(r"[+＋(（]{0,2}\d(?:[\s\-./()（）・‐-―−－]{0,3}\d){6,40}")
_PHONE_SEPARATED = re.compile(r"\d[\s\-/()（）‐-―−－]+\d|\d\.\d+\.\d")
_DATE = re.compile(r"^[(（]?(?:1[5-9]|20)\d\d[\-./年](?:1[5-9]\d\d|20\d\d|[01]?\d(?:[\-./]|$))")

_PRIVATE_KEY = re.compile(r"-----BEGIN (?P<kind>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END (?P=kind)-----|\Z)", re.DOTALL)
# Tokens whose issuer marks them: AWS, GitHub, GitLab, Slack, Google, Stripe, OpenAI and Anthropic, Hugging Face, npm, PyPI, SendGrid, JWT.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{36,255}"
    r"|glpat-[A-Za-z0-9_\-]{20,}"
    r"|xox[abeoprs]-[A-Za-z0-9\-]{10,}"
    r"|AIza[A-Za-z0-9_\-]{35}|ya29\.[A-Za-z0-9_\-]{20,}|GOCSPX-[A-Za-z0-9_\-]{28}"
    r"|[rs]k_live_[A-Za-z0-9]{16,}"
    r"|sk-(?:proj-|ant-)?[A-Za-z0-9_\-]{32,}"
    r"|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_\-]{50,}"
    r"|SG\.[A-Za-z0-9_\-]{16,}\.[A-Za-z0-9_\-]{16,}"
    r"|eyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}"
    r")(?![A-Za-z0-9])"
)
# A value of high entropy that something calls a secret.
_SECRET = re.compile(
    r"(?:secret|passw(?:or)?d|token|api[_\-]?key|access[_\-]?key|auth[_\-]?key|private[_\-]?key|credential)s?[A-Za-z0-9_]*"
    r"[\"']?\]?\s{0,2}(?::=|=>|[:=])\s{0,2}[\"']?(?P<value>[A-Za-z0-9+/_=\-]{16,128})(?![A-Za-z0-9+/_=\-(.\[])",
    re.IGNORECASE,
)
# Bits a character. Hexadecimal digits cannot exceed 4; identifiers and words stay under 3.5 or have no digits.
_SECRET_ENTROPY = 3.0


@dataclass(frozen=True)
class Finding:
    """A stretch [start, end) of a text, and what it is."""

    start: int
    end: int
    kind: Kind


def redact(text: str, language: str) -> tuple[str, Counter[Kind]]:
    """The text with placeholders of the language for what was found, and how many of each kind. Redacting again changes nothing.

    Args:
      text: a document.
      language: a key of PLACEHOLDERS; others get English placeholders, and telephone numbers only with their country code.
    """
    placeholders = PLACEHOLDERS.get(language, PLACEHOLDERS["en"])
    counts: Counter[Kind] = Counter()
    # What goes was the context of what stays, so a second look may find more; it ends, for placeholders hold nothing that can be found.
    while findings := find(text, language):
        pieces, end = [], 0
        for finding in findings:
            pieces += [text[end : finding.start], placeholders[finding.kind]]
            end = finding.end
            counts[finding.kind] += 1
        text = "".join(pieces) + text[end:]
    return text, counts


def find(text: str, language: str) -> list[Finding]:
    """What would be redacted, in order; where findings overlap, the one that begins first, and of those the longest."""
    found = [*_keys(text), *_emails(text), *_ip_addresses(text), *_phone_numbers(text, language)]
    kept: list[Finding] = []
    for finding in sorted(found, key=lambda finding: (finding.start, -finding.end)):
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
    return kept


def _keys(text: str) -> Iterator[Finding]:
    if "PRIVATE KEY" in text:
        for match in _PRIVATE_KEY.finditer(text):
            yield Finding(match.start(), match.end(), "KEY")
    for match in _TOKEN.finditer(text):
        yield Finding(match.start(), match.end(), "KEY")
    for match in _SECRET.finditer(text):
        if _is_random(match["value"]):
            yield Finding(match.start("value"), match.end("value"), "KEY")


def _is_random(value: str) -> bool:
    """Whether a value looks drawn, not written: letters and digits mixed, and high entropy."""
    digits = sum(character.isdigit() for character in value)
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in Counter(value).values())
    return digits >= 3 and any(character.isalpha() for character in value) and entropy >= _SECRET_ENTROPY


def _emails(text: str) -> Iterator[Finding]:
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        domain = match.group().rpartition("@")[2]
        if not _RESERVED_DOMAIN.search(domain) and not match.group().startswith("git@"):
            yield Finding(match.start(), match.end(), "EMAIL")


def _ip_addresses(text: str) -> Iterator[Finding]:
    """Global addresses only: private, reserved and documentation addresses point at nobody."""
    for match in _IPV4.finditer(text):
        try:
            address = ipaddress.IPv4Address(match.group())
        except ValueError:
            continue
        before = text[max(0, match.start() - _CONTEXT) : match.start()]
        if not address.is_global or address.is_multicast or _VERSION_BEFORE.search(before):
            continue
        if max(address.packed) < _SMALL_OCTET and not _ADDRESS_BEFORE.search(before):
            continue
        yield Finding(match.start(), match.end(), "IP_ADDRESS")
    if "::" not in text and text.count(":") < 7:
        return
    for match in _IPV6.finditer(text):
        try:
            address6 = ipaddress.IPv6Address(match.group())
        except ValueError:
            continue
        if address6 in _GLOBAL_IPV6 and address6.is_global:
            yield Finding(match.start(), match.end(), "IP_ADDRESS")


def _phone_numbers(text: str, language: str) -> Iterator[Finding]:
    taken: set[tuple[int, int]] = set()
    for candidate in _PHONE_LIKE.finditer(text):
        # The matcher is slow, so it sees only what has enough digits, with the character before and after, which it judges by.
        start = max(0, candidate.start() - 2)
        window = text[start : candidate.end() + 2]
        readings: list[tuple[str | None, int]] = [(None, phonenumbers.Leniency.VALID)]  # with its country code, however it is grouped
        readings += [(region, phonenumbers.Leniency.STRICT_GROUPING) for region in _REGIONS.get(language, ())]
        for region, leniency in readings:
            for match in phonenumbers.PhoneNumberMatcher(window, region, leniency):
                number = match.raw_string
                if not {")", "）"} & set(number):  # a bracket that opens before the number and closes after it is not part of it
                    number = number.lstrip("(（")
                span = (start + match.end - len(number), start + match.end)
                if span not in taken and _is_written_as_a_number(number, language):
                    taken.add(span)
                    yield Finding(*span, "PHONE")


def _is_written_as_a_number(number: str, language: str) -> bool:
    """Whether digits are set out as a telephone number is; bare ones are rather identifiers. India writes mobiles as ten bare digits."""
    if _DATE.match(number):
        return False
    return number[0] in "+＋0０" or language == "hi" or _PHONE_SEPARATED.search(number) is not None
