"""Languages: their names, scripts and colours, in one place. A tag is one of BCP 47 (fi, zh-Hant), and code is a
language, too.

The table has those that Aurora-M teaches. A language that nobody foresaw has a name and a colour of its own as well.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

CODE = "code"
NATURAL = ("en", "fi", "hi", "ja", "vi")
"""The natural languages of Aurora-M, and of the sample corpus."""
LANGUAGES = (*NATURAL, CODE)
"""In the order of tables."""


@dataclass(frozen=True)
class Language:
    """What is known of a language."""

    name: str
    """In English."""
    colour: str
    """In every chart; of Okabe and Ito's palette, which colour-blind readers can tell apart."""


TABLE: Mapping[str, Language] = {
    "en": Language("English", "#0072B2"),
    "fi": Language("Finnish", "#56B4E9"),
    "hi": Language("Hindi", "#E69F00"),
    "ja": Language("Japanese", "#CC79A7"),
    "vi": Language("Vietnamese", "#009E73"),
    CODE: Language("Code", "#555555"),
}

LETTERS: Mapping[str, str] = {
    "Deva": "\u0900-\u0963\u0970-\u097f",
    "Jpan": "\u3041-\u3096\u30a1-\u30fa\u30fc\u3400-\u4dbf\u4e00-\u9fff",
}
"""Letters of a script (ISO 15924), as the inside of a regular expression's class; punctuation and digits are none."""

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー々〆"
"""Scripts that write no spaces between words, as the inside of a class of the package `regex`. ー (U+30FC) and 々
belong to no script of their own in Unicode."""

# Of new colours: lightness and chroma in OKLCH, whose contrast (WCAG 2.2) is at least 3 on white and on the dark page
# of a report; and how far two of a chart are apart in OKLab.
LIGHTNESSES, CHROMA = (0.64, 0.535), 0.13
APART = 0.12
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


def name_of(tag: str) -> str:
    """The English name of a language; a tag that Unicode's CLDR does not know is its own name."""
    if tag in TABLE:
        return TABLE[tag].name
    from babel import Locale  # a tenth of a second, for those who meet such a language

    names = Locale("en").languages
    written = tag.replace("-", "_")
    base, _, rest = written.partition("_")
    if written in names:
        return names[written]
    return f"{names[base]} ({rest.replace('_', '-')})" if base in names and rest else names.get(base, tag)


def in_order(tags: Iterable[str]) -> list[str]:
    """Each tag once: those of the table in its order, then the others by tag."""
    found = set(tags)
    return [tag for tag in TABLE if tag in found] + sorted(found - TABLE.keys())


def colours_of(tags: Iterable[str]) -> dict[str, str]:
    """A colour for each language of one chart, as #RRGGBB.

    A language of the table has the table's. Another one's follows from its tag, so that it is the same in every chart
    in which no other language has one much like it.
    """
    colours: dict[str, str] = {}
    taken = [_oklab(language.colour) for language in TABLE.values()]
    for tag in in_order(tags):
        if tag in TABLE:
            colours[tag] = TABLE[tag].colour
            continue
        apart = APART
        for number, colour in enumerate(_candidates(tag), start=1):
            place = _oklab(colour)
            if all(math.dist(place, other) >= apart for other in taken):
                break
            if number % 64 == 0:  # so many languages that they must stand closer
                apart *= 0.8
        colours[tag] = colour
        taken.append(place)
    return colours


def colour_of(tag: str) -> str:
    """The colour of a language that is alone in its chart; see `colours_of`."""
    return colours_of([tag])[tag]


def _candidates(tag: str) -> Iterator[str]:
    """Colours without end: the first by the tag, the next a golden angle further, light and dark in turn."""
    first = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:4], "big")
    for number in itertools.count(first):
        yield _in_gamut(LIGHTNESSES[number % len(LIGHTNESSES)], number * GOLDEN_ANGLE)


def _in_gamut(lightness: float, hue: float) -> str:
    """The sRGB colour of a lightness and hue in OKLCH, with as much of the chroma as sRGB has."""
    for chroma in (CHROMA * share / 10 for share in range(10, 0, -1)):
        a, b = chroma * math.cos(hue), chroma * math.sin(hue)
        # Ottosson 2020, "A perceptual color space for image processing".
        l, m, s = (
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        )
        l, m, s = l**3, m**3, s**3
        linear = (
            4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
            -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
            -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
        )
        if all(0 <= value <= 1 for value in linear):
            break
    return "#" + "".join(f"{round(255 * _encoded(min(max(value, 0), 1))):02X}" for value in linear)


def _encoded(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def _linear(colour: str) -> list[float]:
    values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def _oklab(colour: str) -> tuple[float, float, float]:
    red, green, blue = _linear(colour)
    l, m, s = (
        math.cbrt(0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue),
        math.cbrt(0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue),
        math.cbrt(0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue),
    )
    return (
        0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s,
        1.9779984951 * l - 2.4285922050 * m + 0.4505937099 * s,
        0.0259040371 * l + 0.7827717662 * m - 0.8086757660 * s,
    )
