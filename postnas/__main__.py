"""The command line: `postnas COMMAND ...`, or `python -m postnas COMMAND ...`.

A user's mistake is one line on stderr and exit code 2; an interrupted run exits with 130.
"""

from __future__ import annotations

import sys

from postnas.commands import overview, parse
from postnas.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    try:
        command, values = parse(arguments[0], arguments[1:])
        command(**values)
    except UserError as error:
        print(f"postnas: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("postnas: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
