"""E-mail addresses in running text and in code, found by a grammar.

An address is a local part, a sign for "at", and a domain name under a suffix of the public suffix list. RFC 6531 allows
letters of any script in both, so where the script changes an address ends: Japanese writes no space around it. What may
be an address and a piece of a program alike (`x@w.data`, `main@queue.rs`) is decided by what stands around it, and in
code only.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator

import regex
from publicsuffixlist import PublicSuffixList

_AT_SIGNS = ("@", "＠", "﹫")
_BRACKETED = r" ?[\[({{（［] ?(?:{}) ?[\])}}）］] ?"  # as people write them against harvesters
_AT = "|".join(_AT_SIGNS) + "|%40|&#(?:64|x40);|&commat;|" + _BRACKETED.format("at|ät|एट|アット")
_DOT = r"[.．]|" + _BRACKETED.format("dot|punkt|piste|chấm|डॉट|ドット")
# What each of them has, which is found some thirty times as fast.
_HINT = regex.compile(r"[@＠﹫]|%40|&[#c]|[\[({（［] ?(?i:at|ät|एट|アット)")

# Every part is bounded and none is tried twice (possessive), so that the work grows with the text and no faster.
_LABEL = r"[\p{L}\p{Nd}][\p{L}\p{M}\p{Nd}\-－\u200c\u200d]{0,62}+"
_FROM_AT = regex.compile(
    r"(?i)(?<=[\p{L}\p{M}\p{N}_+\-＿＋－])"  # else no local part ends here
    rf"(?P<at>{_AT})(?P<domain>{_LABEL}(?:(?:{_DOT}){_LABEL}){{1,8}}+)"
)
_DOT_BEFORE = regex.compile(f"(?ri){_DOT}")
_DOTS = regex.compile(f"(?i){_DOT}")
# One script at a time. Latin comes first, and digits alone go with it.
_UNSPACED = (r"\p{Han}", r"\p{Hiragana}", r"\p{Katakana}ー", r"\p{Hangul}", r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}")
_SCRIPTS = (r"\p{Latin}", *_UNSPACED, rf"[\p{{L}}--[\p{{Latin}}{''.join(_UNSPACED)}]]")
_LONGEST_LOCAL = 64  # RFC 5321, section 4.5.3.1.1
_D, _M, _LAST = r"\p{Nd}", r"\p{M}", r"_+\-＿＋－"
_INNER = _LAST + r".．\u200c\u200d"
_LOCAL = regex.compile(  # read backwards from the sign
    "(?rV1)" + "|".join(rf"[{s}{_D}](?:[{s}{_D}{_M}{_INNER}]{{0,62}}[{s}{_D}{_M}{_LAST}])?" for s in _SCRIPTS)
)
_IRISH = regex.compile(r"(?r)(?<![\p{L}\p{N}])[OoDd]['’]")  # O'Brien; in code it is a prefix of a string
_RUN = regex.compile(
    r"(?i)xn--[a-z0-9\-]+|\p{Latin}+"  # and the other scripts, one at a time
    r"|\p{Han}+|\p{Hiragana}+|[\p{Katakana}ー]+|\p{Hangul}+|[\p{L}\p{M}]+"
)
_CAPITAL = regex.compile(r"\p{Lu}")
_NEXT_SENTENCE = regex.compile(r"\p{Lu}\p{Ll}|(?!\p{Latin})\p{L}")

# RFC 2606 and 6761 reserve these for examples: they are nobody's. `.example`, `.test` and the like are on no list.
_RESERVED = regex.compile(r"(?:^|\.)example\.(?:com|net|org|edu)$")
_SERVICE_ACCOUNTS = frozenset({"git", "hg", "svn"})  # SSH users of hosts of repositories: no person, no mailbox

_ALGORITHM_DOMAINS = frozenset({"openssh.com", "libssh.org"})  # RFC 4251, section 6: aes128-gcm@openssh.com
_PASSWORDS = frozenset({"pass", "passwd", "password", "pw", "pwd", "secret", "token"})

_ESCAPE = regex.compile(r"\\(?:[nrtfv]|x[0-9A-Fa-f]{2}|u(?P<letter>[0-9A-Fa-f]{4}))|%[0-9A-Fa-f]{2}")
_USERINFO = regex.compile(r"(?ri)(?P<scheme>[a-z][a-z0-9+.\-]{0,20})://[^\s/?#\"'<>]{0,128}")
_MAILBOX_SCHEMES = frozenset({"mailto", "sip", "sips", "xmpp", "acct", "im"})

# Suffixes that are endings of files as well, or names of attributes, slots and units.
_FILE_COUNTRIES = frozenset(["cc", "id", "la", "md", "mk", "ml", "pl", "pm", "ps", "py", "rs", "sh", "so"])
_FILE_WORDS = frozenset(["app", "cat", "data", "date", "dot", "map", "mov", "name", "pub", "target", "zip"])
_COMMON_SUFFIXES = frozenset(["ai", "biz", "com", "edu", "gov", "info", "int", "io", "mil", "net", "org"])
_CALLED = frozenset({"info", "int"})  # logger.info(...), tensor.int()
_VERSION_LABEL = regex.compile(r"v?\d+[a-z]?\d*")
_OBJECTS = frozenset(["self", "this", "super", "return", "np", "jnp", "torch", "tf"])
_SAYS_MAIL = regex.compile(
    r"(?i)mail|author|contact|maintain|owner|sender|recipient|reply|copyright|\(c\)|©"
    r"|-by:|\b(?:b?cc|to|from):|[<＜]$|連絡|宛"
)
_COMMENT = regex.compile(r"(?:^|\s)(?:#|//|/?\*|--|%+|;+|<!--|\"\"\")\s")
_ASIDE = regex.compile(r"\w \($")
_LOOK_BACK = 80


def find_addresses(text: str, language: str) -> Iterator[tuple[int, int]]:
    """Stretches [start, end) of the text that are addresses of mailboxes, in order.

    Args:
      text: a document.
      language: in "code", matrix products, slots and names of files are told from addresses.
    """
    for hint in _HINT.finditer(text):
        at = hint.start() - (text[hint.start() - 1 : hint.start()] == " ")
        match = _FROM_AT.match(text, at)
        if match is None:
            continue
        local = _LOCAL.match(text, max(0, at - _LONGEST_LOCAL), at)
        end = _end(text, match.start("domain"), match.end("domain"), language)
        start = _start(text, local.start(), at, match["at"], language) if local and end else None
        if start is None or end is None:
            continue
        name, domain = text[start:at].lower(), _domain(text[match.start("domain") : end])
        if _RESERVED.search(domain) or name in _SERVICE_ACCOUNTS or _is_version_of_a_file(domain):
            continue
        if domain in _ALGORITHM_DOMAINS and not domain.startswith(name):
            continue
        if language != "code" or not _is_program(text, start, end, name, domain):
            yield start, end


def _start(text: str, start: int, at: int, sign: str, language: str) -> int | None:
    """Where an address begins whose local part can reach back to `start`; None if what stands before makes it none."""
    if sign in _AT_SIGNS:
        userinfo = _USERINFO.match(text, max(0, start - 152), start)
        if userinfo and userinfo["scheme"].lower() not in _MAILBOX_SCHEMES:
            return None
    before = text[start - 1] if start else " "
    if before in "\\%":
        escape = _ESCAPE.match(text, start - 1, at)
        if escape is None:
            return None  # a format or a pattern, which stands for any name
        if escape["letter"] and chr(int(escape["letter"], 16)).isalpha():  # pers\u00f6n@firma.fi
            local = _LOCAL.match(text, max(0, start - 1 - _LONGEST_LOCAL), start - 1)
            return local.start() if local else start - 1
        return escape.end() if escape.end() < at else None
    too_long = before.isalnum() and at - start == _LONGEST_LOCAL
    if before == "$" or too_long or (before in _AT_SIGNS and language == "code"):
        return None
    if before == ":" and text[start:at].lower() in _PASSWORDS:  # user:password@host
        return None
    if len(sign) > 3:  # in brackets, as the dots before it may be: nick(dot)name(at)firma(dot)fi
        for _ in range(4):
            dot = _DOT_BEFORE.match(text, max(0, start - 12), start)
            local = _LOCAL.match(text, max(0, dot.start() - _LONGEST_LOCAL), dot.start()) if dot else None
            start = local.start() if local else start
    irish = _IRISH.match(text, max(0, start - 3), start) if language != "code" else None
    return irish.start() if irish else start


def _end(text: str, start: int, end: int, language: str) -> int | None:
    """Where the domain name in [start, end) ends: behind its last label that is a public suffix. None if it
    has none."""
    dots = list(_DOTS.finditer(text, start, end))
    label_end = end
    for dot in reversed(dots):
        run = _RUN.match(text, dot.end())
        suffix_end = _suffix_end(text, run.start(), run.end(), language) if run else None
        if suffix_end and _public_suffix(_domain(text[start:suffix_end])):
            if suffix_end < label_end or label_end == end:
                return suffix_end if _may_follow(text, suffix_end, language) else None
            # A sentence that begins without a space; any other label makes a domain that is not there.
            if language != "code" and _NEXT_SENTENCE.match(text, label_end + 1):
                return suffix_end
        label_end = dot.start()
    return None


def _suffix_end(text: str, start: int, end: int, language: str) -> int | None:
    """Where the suffix in [start, end) ends, or None if it is none.

    Before a capital, if a text has lost a space (`firma.comTel.`) or is Perl's (`E<lt>info@firma.comE<gt>`).
    In a program, lower case before capitals is a name: `key.mT`, `object.toString`.
    """
    capital = _CAPITAL.search(text, start, end) if text[start].islower() else None
    if capital is None:
        return end
    return capital.start() if language != "code" or text.startswith("E<", capital.start()) else None


def _may_follow(text: str, end: int, language: str) -> bool:
    """Whether an address can end here: not within a word or name, but before an ending (`info@firma.fi-osoite`)."""
    after, next_after = text[end : end + 1], text[end + 1 : end + 2]
    if after.isdecimal() or (after and unicodedata.combining(after)) or after in _AT_SIGNS:
        return False
    if after == "_" or (after in ("-", "$") and language == "code"):
        return not next_after.isalnum()
    return True


@functools.lru_cache(maxsize=1)
def _suffixes() -> PublicSuffixList:
    """The list that comes with the package, at its pinned version: nothing is fetched."""
    return PublicSuffixList(accept_unknown=False, only_icann=True)


@functools.lru_cache(maxsize=65536)
def _public_suffix(domain: str) -> str | None:
    return _suffixes().publicsuffix(domain) if not domain.endswith("-") else None


@functools.lru_cache(maxsize=65536)
def _domain(written: str) -> str:
    """A domain name as the list has it: dots for what stands for them, lower case, in the usual width."""
    return unicodedata.normalize("NFKC", _DOTS.sub(".", written)).lower()


def _is_version_of_a_file(domain: str) -> bool:
    """`archive@2024.zip`, `icon@2x.pl`, `node@18.sh`: numbers alone before what is an ending of files, too."""
    *labels, suffix = domain.split(".")
    return suffix in _FILE_COUNTRIES | _FILE_WORDS and all(_VERSION_LABEL.fullmatch(label) for label in labels)


def _is_program(text: str, start: int, end: int, name: str, domain: str) -> bool:
    """Whether what has an address's form is a product, slot, unit or file: by its suffix and what stands around it."""
    *labels, last = domain.split(".")
    suffix = _public_suffix(domain) or last
    if suffix == domain or labels[0] in _OBJECTS:
        return True
    line = text[max(0, start - _LOOK_BACK) : start].rpartition("\n")[2]
    says_mail = _SAYS_MAIL.search(line) is not None
    called = text[end : end + 1] in ("(", "[")
    if says_mail or "." in suffix or (last in _COMMON_SUFFIXES and not (called and last in _CALLED)):
        return False
    if last in _FILE_WORDS or name in _OBJECTS or called:
        return True
    if _COMMENT.search(line) or (_ASIDE.search(line) and text[end : end + 1] == ")"):
        return False
    if len(last) > 2 and last.isascii() and not last.startswith("xn--"):
        before, after = text[start - 1 : start], text[end : end + 1]
        return not (before in ("'", '"', "`") and before == after)
    return last in _FILE_COUNTRIES
