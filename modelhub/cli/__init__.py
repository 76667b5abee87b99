"""The `modelhub` command. Results go to standard output, progress and remarks to standard error."""

import sys
import warnings


def main() -> None:
    """Entry point: errors made for the user are printed without a traceback."""
    from modelhub.cli.commands import app
    from modelhub.errors import ModelhubError

    warnings.formatwarning = lambda message, *_: f"modelhub: {message}\n"  # for people, not for programmers
    try:
        app()
    except ModelhubError as error:
        print(f"modelhub: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe (head) has left; closing again at exit must not complain
        sys.stdout = None
        sys.exit(141)
