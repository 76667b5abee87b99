"""Every error a user can cause. Each message says what was asked, what was found and what to do.

All inherit from ModelhubError and from the builtin that fits, so `except ValueError` works as people expect.
"""

import re

_LONGEST = 8_000  # characters of a message
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class ModelhubError(Exception):
    """Base of all errors that modelhub raises on purpose; the command line prints these without a traceback."""

    def __str__(self) -> str:
        # What a message quotes may come out of a stranger's file: megabytes of it, or codes that terminals obey.
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"
        return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


class PresetNotFound(ModelhubError, LookupError):
    """A preset name, folder or address that leads nowhere."""


class CheckpointError(ModelhubError, ValueError):
    """Files that are damaged, refused, or disagree with the config."""


class ConfigError(ModelhubError, ValueError):
    """A config that is incomplete, contradictory, or asks for maths that modelhub does not have."""


class TokenizerError(ModelhubError, ValueError):
    """Tokenizer files that are missing, damaged or of an unknown kind."""


class ChatTemplateError(ModelhubError, ValueError):
    """A chat template that is broken, hostile, or refuses the messages; or messages that no template can render."""


class BackendNotInstalled(ModelhubError, ImportError):
    """A framework that was asked for and is not importable."""


class UnknownBackend(ModelhubError, ValueError):
    """A backend name that does not exist."""


class DeviceError(ModelhubError, ValueError):
    """A device that does not exist, or that the backend does not see."""


class MixedBackends(ModelhubError, TypeError):
    """Tensors of two frameworks met in one call."""


class InputError(ModelhubError, ValueError):
    """An argument that cannot be used: an empty prompt, ids out of range, a sampling value that makes no sense."""


class WrongCall(InputError, TypeError):
    """A call that Python itself refuses: an argument is missing, or there is one too many."""


class UnknownArgument(WrongCall):
    """A keyword that a call does not have; the message says what it is called here.

    names: the keywords. known: those that there are.
    """

    def __init__(self, message: str, names: tuple[str, ...] = (), known: list[str] | None = None):
        super().__init__(message)
        self.names, self.known = names, known or []


class DataError(ModelhubError, ValueError):
    """Data to train on that cannot be read, is of no known form, or leaves nothing to learn from."""


class DownloadError(ModelhubError, OSError):
    """A transfer that failed, or that arrived with the wrong bytes."""


class OutOfMemory(ModelhubError, MemoryError):
    """Weights that do not fit into the memory that there is."""


class ResumeError(ModelhubError, ValueError):
    """Checkpoints of a run that cannot be gone on with: it had other settings, or another process is writing them."""


class NoGradients(ModelhubError, NotImplementedError):
    """Training was asked of a backend that only does inference."""


class TrainingError(ModelhubError, ArithmeticError):
    """Training that went wrong on its way: a loss that is no number."""


class NotFinite(ModelhubError, ArithmeticError):
    """Logits that are NaN or infinite: there is no next token to choose."""
