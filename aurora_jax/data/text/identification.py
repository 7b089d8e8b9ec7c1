"""Which language a text is in, by py3langid."""

import functools

from py3langid.langid import MODEL_FILE, LanguageIdentifier


@functools.cache
def identifier(languages: tuple[str, ...] = (), *, probabilities: bool = False) -> LanguageIdentifier:
    """The identifier, loaded once.

    Args:
        languages: ISO 639-1 tags of those to choose from; all 97 without them.
        probabilities: `classify` gives a probability with the language, in place of a score.
    """
    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=probabilities)
    if languages:
        found.set_languages(list(languages))
    return found
