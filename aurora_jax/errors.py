"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """Something that was given to us is wrong: a path, a file, a shape, a setting.

    The message says what is wrong, where, and what to do. Command lines print it without a traceback and exit
    with status 2.
    """
