"""Languages: names by CLDR, colours that can be told apart and read, and what other tables of ours have."""

import colorsys
import re
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from aurora_jax.data.corpora import sample_tasks
from aurora_jax.data.corpora.aurora_m.tasks import ENTRIES
from aurora_jax.data.curation.pii import PLACEHOLDERS
from aurora_jax.data.curation.thresholds import THRESHOLDS
from aurora_jax.languages import LANGUAGES, LETTERS, TABLE, colour_of, colours_of, in_order, name_of

WHITE, DARK_PAGE = "#FFFFFF", "#18191B"
TAGS = st.from_regex(r"\A[a-z]{2,3}(-[A-Z][a-z]{3})?\Z")


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, the definition of contrast ratio."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def differ(one: str, other: str) -> bool:
    """By a red, green or blue that is a tenth apart: what any screen shows."""
    return max(abs(a - b) for a, b in zip(to_rgb(one), to_rgb(other), strict=True)) > 0.1


@given(st.sets(TAGS, max_size=6))
def test_new_languages_differ_from_each_other_and_from_the_known_ones(tags):
    colours = colours_of([*TABLE, *tags])
    assert colours.keys() == TABLE.keys() | tags
    assert all(differ(colours[one], colours[other]) for one, other in combinations(colours, 2))


@given(TAGS)
def test_a_new_language_can_be_read_on_white_and_on_dark_and_is_not_grey(tag):
    if tag in TABLE:
        return
    colour = colour_of(tag)
    assert re.fullmatch("#[0-9A-F]{6}", colour)
    assert contrast(colour, WHITE) >= 3
    assert contrast(colour, DARK_PAGE) >= 3
    assert colorsys.rgb_to_hls(*to_rgb(colour))[2] > 0.2


@given(TAGS, st.sampled_from(sorted(TABLE)))
def test_a_colour_follows_from_the_tag(tag, known):
    """Whatever known languages stand beside it; and the order in which a chart names them changes none."""
    assert colours_of([known, tag])[tag] == colours_of([tag])[tag] == colour_of(tag)
    assert colours_of(["sw", tag, known]) == colours_of([known, tag, "sw"])
    assert colours_of([known])[known] == TABLE[known].colour


def test_a_hundred_new_languages_have_a_hundred_colours():
    tags = [a + b for a in "abcdefghij" for b in "klmnopqrst"]
    assert len({*colours_of(tags).values()}) == len(tags)


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("code", "Code"),
        ("fi", "Finnish"),
        ("sw", "Swahili"),
        ("de", "German"),
        ("zh-Hant", "Traditional Chinese"),
        ("sr-Latn", "Serbian (Latn)"),
        ("mul", "Multiple languages"),
        ("qqq", "qqq"),
        ("wikipedia_sw", "wikipedia_sw"),
        ("–", "–"),
        ("", ""),
    ],
)
def test_names(tag, name):
    assert name_of(tag) == name


def test_the_table_has_the_names_that_cldr_has():
    from babel import Locale

    assert all(Locale("en").languages[tag] == language.name for tag, language in TABLE.items() if tag != "code")


def test_known_languages_come_first():
    assert in_order(["sw", "code", "de", "en", "sw"]) == ["en", "code", "de", "sw"]


def test_every_table_of_ours_has_the_languages():
    assert tuple(TABLE) == LANGUAGES
    assert {f"sample_{language}" for language in LANGUAGES} == sample_tasks.MIXTURES["nano_cap"].keys()
    assert {entry.language for entry in ENTRIES} == {*LANGUAGES, "mul"}
    assert PLACEHOLDERS.keys() == THRESHOLDS.keys() == TABLE.keys()


@pytest.mark.parametrize(("script", "letters", "others"), [("Deva", "कखगा", "a।१"), ("Jpan", "ひカー漢", "a。１、")])
def test_letters_of_a_script(script, letters, others):
    assert re.findall(f"[{LETTERS[script]}]", letters + others) == list(letters)
