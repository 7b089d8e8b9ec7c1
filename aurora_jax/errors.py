"""The one exception that means "the user can mend this", and the exit statuses that mean something.

`aurora_jax/launch/` has its own copies, since it imports nothing of the rest; a test compares.
"""

BAD_INPUT = 2
"""What the user must mend: starting again would not help."""
CHIP_FAULT = 6
"""A chip that miscalculates: a person should look before anything is started again."""
HUNG = 75
"""A process in which nothing has happened for long (EX_TEMPFAIL of sysexits.h): to be started again."""
DIVERGED = 5
"""A run whose updates were skipped in a row: starting again would end in the same way."""


class ChipFault(RuntimeError):
    """Two devices computed the same and had different results."""


class InputError(ValueError):
    """Something that was given to us is wrong: a path, a file, a shape, a setting.

    The message says what is wrong, where, and what to do. Command lines print it without a traceback and exit
    with status 2.
    """


class Damaged(InputError):
    """Something is not what was written, or not all of it is there."""
