"""What the user can mend is told in one line; everything else keeps its traceback."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text before an error: one line, exit code 2."""

    def error(self, message: str) -> None:
        """Raise what argparse would have printed (it still exits by itself after --help)."""
        raise UserError(f"{message} (see python {self.prog} --help)")


def run_command(main: Callable[[], int | None]) -> int:
    """Call `main` and turn what it raises into an exit code.

    Returns: what `main` returned (None counts as 0), 2 after a UserError, 130 after Ctrl-C.
    """
    try:
        return main() or 0
    except UserError as error:
        message = " ".join(str(error).split())  # whatever was quoted in it: one line
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
