"""The errors that a user can mend: wrong input, wrong settings, a full disk.

`main` prints them as one line and exits with status 2; everything else is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """What the user gave cannot be used; the message says which thing, why, and what to do."""
