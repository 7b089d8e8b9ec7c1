"""Keys: private key blocks, tokens that issuers mark, and values that are called a secret and look drawn, not
written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

import regex

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:(?P<body>(?:(?!-----).){0,32768}?)-----END (?P=kind)-----"
    r"|(?:(?:\s|[\"',]|\+(?=\s)|\\+[rn])*+[A-Za-z0-9+/=]{16,}+)++)",  # cut off
    re.DOTALL,
)
_KEY_MATERIAL = re.compile(r"[A-Za-z0-9+/=]{40}")  # without it the marks are spoken of
# AWS, GitHub, GitLab, Slack, Google, Stripe, OpenAI and Anthropic, Hugging Face, npm, PyPI, SendGrid, Shopify,
# DigitalOcean, Databricks, Docker, Vault, Groq, Linear, Grafana, Telegram, JSON web tokens, age.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"A(?:KIA|SIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_\-]{35}|AGE-SECRET-KEY-1[A-Z0-9]{58}"
    r"|GOCSPX-[A-Za-z0-9_\-]{28}|SG\.[A-Za-z0-9_\-]{16,}\.[A-Za-z0-9_\-]{16,}"
    r"|d(?:o[opr]_v1_[a-f0-9]{64}|api[a-f0-9]{32}|ckr_pat_[A-Za-z0-9_\-]{27})"
    r"|(?<!-)eyJ[A-Za-z0-9_\-]{10,}\.eyJ[A-Za-z0-9_\-]{10,}\.[A-Za-z0-9_\-]{10,}"
    r"|g(?:h[pousr]_[A-Za-z0-9]{36,255}|ithub_pat_[A-Za-z0-9_]{36,255}|l(?:pat|dt|rt|ptt|soat|agent)-[A-Za-z0-9_\-]{20,}"
    r"|sk_[A-Za-z0-9]{52}|lsa_[A-Za-z0-9]{32}_[a-f0-9]{8})"
    r"|h(?:f_[A-Za-z0-9]{30,}|vs\.[A-Za-z0-9_\-]{24,})|lin_api_[A-Za-z0-9]{40}"
    r"|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_\-]{50,}|rk_live_[A-Za-z0-9]{16,}"
    r"|s(?:k_live_[A-Za-z0-9]{16,}|k-(?:proj-|ant-)?[A-Za-z0-9_\-]{32,}|hp(?:at|ca|pa|ss)_[a-fA-F0-9]{32})"
    r"|whsec_[A-Za-z0-9+/=]{32,}|x(?:ox[abeoprs]|app)-[A-Za-z0-9\-]{10,}|ya29\.[A-Za-z0-9_\-]{20,}"
    r"|\d{8,10}:AA[A-Za-z0-9_\-]{33}"
    r")(?![A-Za-z0-9])"
)
_WEBHOOK = re.compile(
    r"(?:hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/)"  # the path is the password
    r"(?P<value>[A-Za-z0-9/_\-]{30,})"
)

# What a secret is called. A name ends with it (`db_password`, `apiToken`), or with a word that leaves it one;
# `tokenizer_name`, `token_type` and `password_field` are names of something else. Each way of saying it holds one of
# the stems, which are looked for first.
_STEMS = (
    *("secret", "passw", "passphrase", "pwd", "token", "credential", "key", "bearer", "basic"),
    *("salasana", "tunnussana", "avain", "kennwort", "schlüssel", "geheimnis", "पासवर्ड", "कूटशब्द", "कुंजी", "टोकन"),
    *("パスワード", "キー", "秘密鍵", "トークン", "mật khẩu", "khóa", "khoá", "mã bí mật"),
)
_VALUE = (
    r"(?:[\"'`](?P<quoted>[A-Za-z0-9+/_=\-.~!#%&*,:;?@^|$]{12,128}+)(?=[\"'`])"
    r"|[「『]?(?P<bare>[A-Za-z0-9+/_=\-~]{12,128}+)(?![(\[{]|\.\w))"
)
_SECRET = regex.compile(
    r"(?i)(?:"
    r"(?:secret|passw(?:or)?d|passwort|passphrase|pwd|token|credential"
    r"|(?<=(?:api|access|auth|private|secret|account|shared|encryption|signing|master|client)[_\-\s]?)key"
    r"|salasana|tunnussana|avain|kennwort|schlüssel|geheimnis|पासवर्ड|कूटशब्द|कुंजी|टोकन"
    r"|パスワード|(?<=API|アクセス|シークレット|秘密)キー|秘密鍵|トークン|mật khẩu|kh(?:óa|oá)|mã bí mật)s?"
    r"(?:[_\-](?:key|value|base|prod|production|dev|test|live|api|v?\d{1,2})|key|\d{1,2}|\sAPI)*+"
    r"(?:[\"'`]?[\])）]?(?:\s{0,2}(?::=|=>|[:=：＝]|は)|\s(?:is|to|on|ist|là|है)\b)\s{0,2}|\s)"
    rf"|\b(?:bearer|basic|(?<=authorization:\s?)token)\s){_VALUE}"
)
_URL_PASSWORD = re.compile(r"://[^\s:/@]{0,64}:(?P<value>[^\s:/@]{12,128})@")

# Bits a character. Hexadecimal digits cannot exceed 4.
_LEAST_ENTROPY = 2.75
_HEXADECIMAL = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_LEAST_HEXADECIMAL = 20
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_PLACEHOLDER = re.compile(r"(?i)example|changeme|placeholder|insert_|your[_\-]|dummy|xxxx|1234567|abcdefg|(.)\1{4}")
_PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_SIGN = re.compile(r"[\-_./:+]")
_PART = re.compile(r"(?:[A-Z]?[a-z]+|[A-Z]+)?\d*")
_WORD = re.compile(r"(?i)(?=.*[aeiouy])(?!.*[^aeiouy]{4})[a-z]+")


def find_keys(text: str) -> Iterator[tuple[int, int]]:
    """Stretches [start, end) of the text that are keys; they may overlap."""
    if "PRIVATE KEY" in text:
        for match in _PRIVATE_KEY.finditer(text):
            if match["body"] is None or _KEY_MATERIAL.search(match["body"]):
                yield match.span()
    for match in _TOKEN.finditer(text):
        if not _PLACEHOLDER.search(match.group()):
            yield match.span()
    if "/services/" in text or "/webhooks/" in text:
        for match in _WEBHOOK.finditer(text):
            if _is_drawn(match["value"].rpartition("/")[2]):
                yield match.span("value")
    for position in _stems(text):
        match = _SECRET.match(text, position)
        group = match.lastgroup if match else None
        if match and group and _is_drawn(match[group]):
            yield match.span(group)
    if "://" in text:
        for match in _URL_PASSWORD.finditer(text):
            if _is_drawn(match["value"]):
                yield match.span("value")


def _stems(text: str) -> Iterator[int]:
    """Where a stem of what secrets are called begins. `str.find` is far faster than a pattern that ignores case."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a few capitals (U+0130) are two characters in lower case
        lowered = "".join(character if len(character.lower()) > 1 else character.lower() for character in text)
    for stem in _STEMS:
        position = lowered.find(stem)
        while position >= 0:
            yield position
            position = lowered.find(stem, position + 1)


def _is_drawn(value: str) -> bool:
    """Whether a value looks drawn at random: high entropy, no placeholder, and not words and numbers set side
    by side."""
    if _UUID.fullmatch(value):
        return True
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in Counter(value).values())
    if entropy < _LEAST_ENTROPY or _PLACEHOLDER.search(value):
        return False
    if _HEXADECIMAL.fullmatch(value):  # shorter ones name things more often than they open any
        return len(value) >= _LEAST_HEXADECIMAL
    pieces = _PIECE.findall(value)
    if not pieces or sum(any(map(is_of, value)) for is_of in (str.islower, str.isupper, str.isdigit)) < 2:
        return False
    # Names are words between signs; what is drawn has a sign seldom, and hardly ever a word between two.
    parts = _SIGN.split(value)
    if len(parts) > 2 and sum(len(part) for part in parts if _PART.fullmatch(part)) >= len("".join(parts)) / 2:
        return False
    characters = sum(map(len, pieces))
    in_words = sum(len(piece) for piece in pieces if len(piece) >= 5 and _WORD.fullmatch(piece))
    return in_words < characters / 2 and characters / len(pieces) < 3.5
