"""What all places to publish to share: what is sent there, what is there already, how failures are told."""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from modelhub.errors import DownloadError, InputError
from modelhub.hub.files import WEIGHTS

_SECRET = re.compile(r"\b(hf_|KGAT_)\w{6,}|(?<=Bearer )\S+")


@dataclass(frozen=True)
class Change:
    """One file of a publication. state: "new", "changed", "unchanged", "removed" or "not compared"; size in bytes."""

    name: str
    size: int
    state: str


@dataclass(frozen=True)
class File:
    """A file to publish. name: relative, with forward slashes. content: where it is, or the bytes themselves."""

    name: str
    size: int
    sha256: str
    content: Path | bytes

    def matches(self, digest: str) -> bool:
        """digest: the sha256, or git's sha1 of a blob, which the Hub gives for small files."""
        return digest == (self.sha256 if len(digest) == 64 else self._git_id)

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    @cached_property
    def _git_id(self) -> str:
        data = self.read()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class There:
    """What is at an address before. version: of the last publication, None: there was none. files: {name: digest}."""

    version: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    private: bool | None = None  # None: nothing is there, or it is for those who can read the folder
    licence: str | None = None
    base: str | None = None  # the commit that a new one follows


@dataclass(frozen=True)
class Shipment:
    files: Sequence[File]
    changes: Sequence[Change]
    private: bool
    message: str | None
    licence: str | None
    token: str | None = field(repr=False)

    def states(self, *states: str) -> list[str]:
        return [change.name for change in self.changes if change.state in states]


class Target(Protocol):
    """A place to publish to. address: of the newest version there. whole: all files are sent, and none stays."""

    whole: ClassVar[bool]

    @property
    def address(self) -> str: ...

    @property
    def title(self) -> str: ...  # the model's name there

    def look(self, folder: Path, token: str | None) -> There:
        """What is there. Raises DownloadError where that cannot be said, InputError where it must not be replaced."""
        ...

    def check(self, files: Sequence[File], there: There, private: bool, licence: str | None) -> list[str]:
        """Remarks on what this place cannot do. Raises InputError for what it must not."""
        ...

    def send(self, shipment: Shipment, there: There) -> str:
        """Publish as a whole or not at all; the version. Raises DownloadError."""
        ...

    def published(self, version: str) -> tuple[str, str | None]:
        """The address of a version, and the page to look at it."""
        ...


def kinds(names: Collection[str]) -> set[str]:
    """What files of these names are, in words."""
    model = {"a model"} if any(map(WEIGHTS.fullmatch, names)) else set()
    return model | ({"an adapter"} if "adapter_model.safetensors" in names else set())


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def check_privacy(address: str, there: There, private: bool, page: str) -> list[str]:
    """Nothing becomes public by mistake, and nothing's visibility is changed behind its owner's back."""
    if private and there.private is False:
        raise InputError(
            f"{address} is public, and private=True was asked, which is the default. To publish where everybody can "
            f"read it say private=False (--public); to make it private first, open {page}"
        )
    if not private and there.private:
        return [f"{address} was private and stays private; to make it public open {page}"]
    return []


def failed(error: Exception, address: str, hub: str, login: str, token: str | None, resumes: str = "") -> DownloadError:
    """What went wrong with a hub's client, in words, without any secret. resumes: what a second attempt saves."""
    again = f"What was published before is as it was; run the same again{resumes}"
    status, cause, seen = None, error, error
    while status is None and cause is not None:  # the client wraps what a thread of its raised
        response = getattr(cause, "response", None)
        status, seen = (response.status_code, cause) if response is not None else (None, error)
        cause = cause.__cause__  # type: ignore[assignment]
    reason = getattr(seen, "server_message", None) or str(seen) or type(seen).__name__
    reason = " ".join(str(reason).replace(token or "\0", "***").split())
    reason = _SECRET.sub("***", reason)[:300].rstrip(".")
    if status == 401:
        text = f"{hub} does not know who you are (401). Log in with an account that may write there: {login}"
    elif status == 403:
        text = f"{hub} does not let your account, or its token, write there (403: {reason}). Log in with one that may"
        text += f": {login}"
    elif status == 412:
        text = "somebody else has published there just now (412), and this was not; run the same again"
    elif status == 429:
        text = f"{hub} takes no more requests from you for now (429: {reason}). {again}, later"
    elif status is not None:
        text = f"{hub} failed or refused ({status}: {reason}). {again}"
    else:
        text = f"{hub} could not be reached, or the transfer broke off ({reason}). {again}"
    return DownloadError(f"{address}: {text}")
