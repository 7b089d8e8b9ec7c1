"""Redaction of what points at a person or opens a door: e-mail addresses, telephone numbers, IP addresses, keys.

What is found is checked before it goes: domains by the public suffix list, IP addresses by `ipaddress`,
numbers by `phonenumbers`. Names of people stay: telling them from other words takes a model (a hook's work).
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import phonenumbers

from aurora_jax.data.curation.emails import find_addresses
from aurora_jax.data.curation.keys import find_keys

Kind = Literal["EMAIL", "PHONE", "IP_ADDRESS", "KEY"]
KINDS: tuple[Kind, ...] = ("EMAIL", "PHONE", "IP_ADDRESS", "KEY")

# What stands in the place of each kind, in the words of the language, so that a model learns to write a
# placeholder and no address.
PLACEHOLDERS: Mapping[str, Mapping[Kind, str]] = {
    "en": {"EMAIL": "<EMAIL>", "PHONE": "<PHONE_NUMBER>", "IP_ADDRESS": "<IP_ADDRESS>", "KEY": "<KEY>"},
    "fi": {"EMAIL": "<SÄHKÖPOSTI>", "PHONE": "<PUHELINNUMERO>", "IP_ADDRESS": "<IP-OSOITE>", "KEY": "<AVAIN>"},
    "hi": {"EMAIL": "<ईमेल>", "PHONE": "<फ़ोन नंबर>", "IP_ADDRESS": "<आईपी पता>", "KEY": "<कुंजी>"},
    "ja": {"EMAIL": "<メールアドレス>", "PHONE": "<電話番号>", "IP_ADDRESS": "<IPアドレス>", "KEY": "<キー>"},
    "vi": {"EMAIL": "<THƯ ĐIỆN TỬ>", "PHONE": "<SỐ ĐIỆN THOẠI>", "IP_ADDRESS": "<ĐỊA CHỈ IP>", "KEY": "<KHÓA>"},
    "code": {"EMAIL": "<EMAIL>", "PHONE": "<PHONE_NUMBER>", "IP_ADDRESS": "<IP_ADDRESS>", "KEY": "<KEY>"},
}

# Where numbers without a country code are called from. In code only international numbers are looked for:
# other digits are mostly none.
_REGIONS: Mapping[str, tuple[str, ...]] = {
    "en": ("US", "GB"),
    "fi": ("FI",),
    "hi": ("IN",),
    "ja": ("JP",),
    "vi": ("VN",),
}

_IPV4 = re.compile(r"(?<![\w.\-])(?:\d{1,3}\.){3}\d{1,3}(?![\w\-]|[.+]\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]{1,40}(?![\w:])", re.ASCII)
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")  # all that IANA has given out; abc::def in C++ lies elsewhere
_VERSION_BEFORE = re.compile(
    r"(?:version|\bver|\bv|\breleases?|\brev(?:ision)?|\bbuild|\bfirmware|\bsections?|\bchapters?|\boid|identifier|§"
    r"|[=<>~!^]=|versio[a-zä]*|luku|kohta|abschnitt|kapitel|phiên bản|mục|chương|संस्करण|धारा|अध्याय"
    r"|バージョン|ヴァージョン|版|第)[\s:=\"'(>]{0,3}$"
    # What was updated to; Chrome/118.0.5993.70 of user agents; group:artifact:1.2.3.4 of Maven.
    r"|\b(?:up(?:date|grade)|bump)[a-z]*\b[^\n]{0,16}$|[A-Za-z]/$|[\w.\-]:[\w.\-]+:$",
    re.IGNORECASE,
)
_ADDRESS_BEFORE = re.compile(
    r"(?:\bip|ipv4|addr|host|server|dns|gateway|peer|inet|netmask|subnet|proxy|\bnat\b|\bping\b|\bssh|://|@"
    r"|palvelin|osoit|adresse|rechner|सर्वर|आईपी|पता|サーバ|アドレス|ホスト|máy chủ|địa chỉ)[^\n]{0,16}$",
    re.IGNORECASE,
)
# Numbers side by side, as the paths of SVG have them, are no addresses unless each is one.
_NUMBER_BEFORE = re.compile(r"(?<![\w.\-])(-?[\d.]*\.\d+)[\s,]$")
_NUMBER_AFTER = re.compile(r"[\s,](-?[\d.]{0,40}\.\d{1,20})(?![\w.])")
_ADDRESS_AFTER = re.compile(r"[^\n]{0,8}\b(?:dns|host|server)|[^\n]{0,8}(?:サーバ|アドレス|DNS)", re.IGNORECASE)
_CONTEXT = 24
# Four small numbers are a version or the number of a section more often than an address; one address in 256
# is so small by chance.
_SMALL_OCTET = 64

# Seven digits or more, with what people write between them. Wider digits (Devanagari, full width) are
# `phonenumbers`' own work.
_PHONE_LIKE = re.compile(r"[+＋(（]{0,2}\d(?:[\s\-./()（）・‐-―−－]{0,3}\d){6,40}")
# The matcher takes no number that letters touch; these do: TEL03-..., Gsm040...
_PHONE_BEFORE = re.compile(r"(?:tel|phone|mobile?|cell|gsm|fax|puh|ph|đt|sđt|call)[.:]?$", re.IGNORECASE)
_LINE = 40
_OPERAND_BEFORE = re.compile(r"[\w)\]]\s*$")
_ARITHMETIC_AFTER = re.compile(r"\s*[*/%]|\.\d|[ej]\b")
_SAYS_PHONE = re.compile(r"(?i)phone|\btel|fax|mobile|gsm|sms|whatsapp|\bcall|contact")
_BEFORE_BARE = ('"', "'", "`", ":", ">", "=")
_SPACED_MOBILE = re.compile(r"0[\d ]+$")
_PHONE_SEPARATED = re.compile(r"\d[\s\-/()（）‐-―−－]+\d|\d\.\d+\.\d")
_DATE = re.compile(r"^[(（]?(?:1[5-9]|20)\d\d[\-./年](?:1[5-9]\d\d|20\d\d|[01]?\d(?:[\-./]|$))")


@dataclass(frozen=True)
class Finding:
    """A stretch [start, end) of a text, and what it is."""

    start: int
    end: int
    kind: Kind


def redact(text: str, language: str) -> tuple[str, Counter[Kind]]:
    """The text with placeholders of the language for what was found, and how many of each kind. Redacting
    again changes nothing.

    Args:
      text: a document.
      language: a key of PLACEHOLDERS; others get English placeholders, and telephone numbers only with their
          country code.
    """
    placeholders = PLACEHOLDERS.get(language, PLACEHOLDERS["en"])
    counts: Counter[Kind] = Counter()
    # What goes was the context of what stays, so a second look may find more; it ends, for placeholders hold
    # nothing that can be found.
    while findings := find(text, language):
        pieces, end = [], 0
        for finding in findings:
            pieces += [text[end : finding.start], placeholders[finding.kind]]
            end = finding.end
            counts[finding.kind] += 1
        text = "".join(pieces) + text[end:]
    return text, counts


def find(text: str, language: str) -> list[Finding]:
    """What would be redacted, in order; of findings that overlap, the longest (the digits of an address are
    no number)."""
    found = [Finding(*span, "KEY") for span in find_keys(text)]
    found += [Finding(*span, "EMAIL") for span in find_addresses(text, language)]
    found += [*_ip_addresses(text), *_phone_numbers(text, language)]
    kept: list[Finding] = []
    for finding in sorted(found, key=lambda finding: (finding.start, -finding.end)):
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
        elif finding.end - finding.start > kept[-1].end - kept[-1].start:
            kept[-1] = finding
    return kept


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
        neighbours = [_NUMBER_BEFORE.search(before), _NUMBER_AFTER.match(text, match.end())]
        if any(number and number[1].count(".") != 3 for number in neighbours):
            continue
        named = _ADDRESS_BEFORE.search(before) or _ADDRESS_AFTER.match(text, match.end())
        if max(address.packed) < _SMALL_OCTET and not named:
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
        # The matcher is slow, so it sees only what has enough digits, with the characters before and after,
        # which it judges by.
        if language == "code" and _is_operand(text, candidate.start(), candidate.end()):
            continue
        named = _PHONE_BEFORE.search(text, max(0, candidate.start() - 8), candidate.start())
        start = candidate.start() if named else max(0, candidate.start() - 2)
        window = text[start : candidate.end() + 2]
        # With its country code a number may be grouped in any way; without, in the region's. Mobile numbers
        # have no area code, and are grouped as one likes, with spaces.
        readings: list[tuple[str | None, int]] = [(None, phonenumbers.Leniency.VALID)]
        for region in _REGIONS.get(language, ()):
            readings.append((region, phonenumbers.Leniency.STRICT_GROUPING))
            if _SPACED_MOBILE.match(candidate.group()):
                readings.append((region, phonenumbers.Leniency.VALID))
        for reading, leniency in readings:
            for match in phonenumbers.PhoneNumberMatcher(window, reading, leniency):
                number = match.raw_string.lstrip("[［")
                if not {")", "）"} & set(number):  # a bracket that closes after the number is not part of it
                    number = number.lstrip("(（")
                mobiles_only = reading is not None and leniency == phonenumbers.Leniency.VALID
                if mobiles_only and phonenumbers.number_type(match.number) != phonenumbers.PhoneNumberType.MOBILE:
                    continue
                span = (start + match.end - len(number), start + match.end)
                if span not in taken and _is_written_as_a_number(number, language):
                    taken.add(span)
                    yield Finding(*span, "PHONE")


def _is_operand(text: str, start: int, end: int) -> bool:
    """Whether digits in a program are a number to compute with: no plus before them, a space after it, an
    operand beside."""
    while text[start] in "(（":
        start += 1
    if text[start] not in "+＋" or (not text[start + 1].isdecimal() and text[start + 1] not in "(（"):
        return True
    line = text[max(0, start - _LINE) : start].rpartition("\n")[2]
    if _ARITHMETIC_AFTER.match(text, end):
        return True
    bare = text[start + 1 : end].isdecimal()
    operand = _OPERAND_BEFORE.search(line) is not None or (bare and not line.endswith(_BEFORE_BARE))
    return operand and not _SAYS_PHONE.search(line)


def _is_written_as_a_number(number: str, language: str) -> bool:
    """Whether digits are set out as a telephone number is; bare ones are rather identifiers. India writes
    mobiles as ten bare digits."""
    if _DATE.match(number):
        return False
    if number.isdecimal() and number[0] not in "0０":
        return language == "hi" and len(number) == 10
    return number[0] in "+＋0０" or language == "hi" or _PHONE_SEPARATED.search(number) is not None
