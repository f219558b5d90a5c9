"""The one exception for a mistake that its maker can mend: bad input, never a bug of ours."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. Its text is one line that names the field or file, the value, and the mend.

    `python -m postnas` prints the line and exits with code 2; no traceback is shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class Diverged(UserError):
    """A loss or gradient that is not finite: a learning rate is too high."""
