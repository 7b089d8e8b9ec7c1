"""Which packages the sample corpus is made of, where the text lies in them, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aurora_jax.languages import NATURAL

Kind = Literal["libreoffice-help", "html", "mallard", "rst", "mo", "po", "xpi", "json", "pak"]

# How packages spell our languages in their paths.
LANGUAGE_TAGS: dict[str, str] = {"C": "en", "en-US": "en", "en-GB": "en", "hi-in": "hi", "hi-IN": "hi"} | {
    language: language for language in NATURAL
}


@dataclass(frozen=True)
class PackageSource:
    """Some files of one package.

    Attributes:
      package: the name in its registry.
      kind: which extractor reads the files.
      pattern: a regular expression that a member's whole path must match. Its group `language`, where there
          is one, names the language.
      license: SPDX expression.
      language: the language of every file, where the path does not say it.
      english_from: gettext catalogues carry the English original beside each translation; this language's
          give the English text.
    """

    package: str
    kind: Kind
    pattern: str
    license: str
    language: str | None = None
    english_from: str | None = None


@dataclass(frozen=True)
class Collection:
    """The packages of one registry.

    Attributes:
      train: sources of training text.
      aligned: the source whose messages exist in all five languages; the natural-language held-out text comes
          from it alone. Where it is
        also among `train`, its other lines are trained on.
      minimum_bytes: how much training text every language must reach for the corpus to be worth having.
    """

    train: tuple[PackageSource, ...]
    aligned: PackageSource
    minimum_bytes: int

    @property
    def packages(self) -> tuple[str, ...]:
        """The distinct package names, in the order of the table."""
        return tuple(dict.fromkeys(source.package for source in (*self.train, self.aligned)))


def _libreoffice_help(tag: str) -> PackageSource:
    package = f"libreoffice-help-{tag}"
    return PackageSource(
        package, "libreoffice-help", r"usr/share/libreoffice/help/(?P<language>[\w-]+)/text/.*\.html", "MPL-2.0"
    )


def _libreoffice_messages(language: str) -> PackageSource:
    pattern = r"usr/lib/libreoffice/program/resource/(?P<language>\w+)/LC_MESSAGES/.*\.mo"
    return PackageSource(f"libreoffice-l10n-{language}", "mo", pattern, "MPL-2.0", english_from="ja")


def _firefox(tag: str) -> PackageSource:
    return PackageSource(
        f"firefox-esr-l10n-{tag}", "xpi", r"usr/lib/firefox-esr/.*\.xpi", "MPL-2.0", language=LANGUAGE_TAGS[tag]
    )


def _gettext(
    package: str, license: str, english_from: str | None = None, prefix: str = r"usr/share/locale"
) -> PackageSource:
    return PackageSource(
        package, "mo", prefix + r"/(?P<language>fi|hi|ja|vi)/LC_MESSAGES/.*\.mo", license, english_from=english_from
    )


DEBIAN = Collection(
    train=(
        *(_libreoffice_help(tag) for tag in ("en-us", "fi", "hi", "ja", "vi")),
        *(_libreoffice_messages(language) for language in ("fi", "hi", "ja", "vi")),
        *(_firefox(tag) for tag in ("fi", "hi-in", "ja", "vi")),
        PackageSource(
            "gnome-user-docs", "mallard", r"usr/share/help/(?P<language>C|fi|hi|ja|vi)/.*\.page", "CC-BY-SA-3.0"
        ),
        PackageSource(
            "evolution-common", "mallard", r"usr/share/help/(?P<language>C|fi|hi|ja|vi)/.*\.page", "CC-BY-SA-3.0"
        ),
        _gettext("evolution-common", "LGPL-2.0-only OR LGPL-3.0-only", english_from="fi"),
        _gettext("gnucash-common", "GPL-2.0-or-later", english_from="ja"),
        _gettext("libgtk-3-common", "LGPL-2.1-or-later"),
        _gettext("krita-l10n", "GPL-2.0-or-later", english_from="ja"),
        PackageSource(
            "debian-reference-en",
            "html",
            r"usr/share/debian-reference/ch\d+\.en\.html",
            "GPL-2.0-or-later",
            language="en",
        ),
        PackageSource(
            "developers-reference",
            "html",
            r"usr/share/developers-reference/(?!index)[a-z0-9-]+\.html",
            "GPL-2.0-or-later",
            language="en",
        ),
        PackageSource(
            "maint-guide", "html", r"usr/share/doc/maint-guide/html/.*\.html", "GPL-2.0-or-later", language="en"
        ),
        PackageSource(
            "debian-policy",
            "html",
            r"usr/share/doc/debian-policy/policy\.html/ch-[a-z-]+\.html",
            "GPL-2.0-or-later",
            language="en",
        ),
        PackageSource(
            "maint-guide-vi", "html", r"usr/share/doc/maint-guide-vi/html/.*\.html", "GPL-2.0-or-later", language="vi"
        ),
        PackageSource(
            "aptitude-doc-fi", "html", r"usr/share/doc/aptitude/html/fi/.*\.html", "GPL-2.0-or-later", language="fi"
        ),
    ),
    aligned=PackageSource(
        "chromium-l10n", "pak", r"usr/lib/chromium/locales/(?P<language>en-GB|fi|hi|ja|vi)\.pak", "BSD-3-Clause"
    ),
    minimum_bytes=500_000,
)

_PLONE = PackageSource(
    "plone-app-locales",
    "po",
    r"plone/app/locales/locales/(?P<language>fi|hi|ja|vi)/LC_MESSAGES/plone\.po",
    "GPL-2.0-only",
    english_from="hi",
)
_HOME_ASSISTANT = PackageSource(
    "home-assistant-frontend",
    "json",
    r"hass_frontend/static/translations/.*?(?P<language>en|fi|hi|ja|vi)-[0-9a-f]+\.json",
    "Apache-2.0",
)

PYPI = Collection(
    train=(
        PackageSource("django", "rst", r"django-[^/]+/docs/.*\.txt", "BSD-3-Clause", language="en"),
        _gettext("django", "BSD-3-Clause", english_from="fi", prefix=r"django-[^/]+/django/.*locale"),
        _gettext("sphinx", "BSD-2-Clause", english_from="ja", prefix=r"sphinx/locale"),
        _PLONE,
        _HOME_ASSISTANT,
    ),
    aligned=_PLONE,
    minimum_bytes=150_000,
)
