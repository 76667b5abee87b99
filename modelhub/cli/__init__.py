"""The `modelhub` command. Results go to standard output, progress and remarks to standard error."""

import errno
import os
import sys
import warnings
from contextlib import suppress

_MEMORY = ("cannot allocate memory", "failed to map segment")  # of the loader, where a library does not fit


def main() -> None:
    """Entry point: errors made for the user are printed without a traceback."""
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe (head) has left
        _leave(141)
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and not any(text in str(error).lower() for text in _MEMORY):
            raise
        _say(f"the memory that this process may have is used up ({error or 'MemoryError'}): close other programs, or "
             f"raise its limit (ulimit -v)")  # fmt: skip
        _leave(1)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            _say(f"the memory that this process may have is used up ({error})")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            _say(f"{error.filename or 'standard output, or another file,'} cannot be written: {error.strerror}")
        else:
            raise
        _leave(1)


def _run() -> None:
    from modelhub.cli.commands import app
    from modelhub.errors import ModelhubError

    warnings.formatwarning = lambda message, *_: f"modelhub: {message}\n"  # for people, not for programmers
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what it says about a full disk is not to come after all else
    except ModelhubError as error:
        _say(error)
        sys.exit(1)


def _say(text: object) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"modelhub: {text}", file=sys.stderr)


def _leave(status: int) -> None:
    """Exit without a second try at what could not be written, of which Python would complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
