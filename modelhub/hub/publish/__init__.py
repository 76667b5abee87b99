"""A folder goes to an address: a repository on the Hugging Face Hub, a model on Kaggle, a folder that others can read.

Each kind of address is a Target, one module each, which knows what is there and how to put files there. What is new,
changed, removed or left out is decided here, for all of them alike. Nothing here knows what a model is.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from modelhub.errors import DownloadError, InputError
from modelhub.hub.files import GENERATED, WEIGHTS
from modelhub.hub.publish.base import Change, File, Shipment, Target, There, kinds, listed
from modelhub.hub.publish.huggingface import HubTarget
from modelhub.hub.publish.kaggle import KaggleTarget
from modelhub.hub.publish.shared_folder import FolderTarget
from modelhub.hub.sources.base import progress, sha256_of
from modelhub.hub.sources.folder import MANIFEST

# All that a card has which the Hub's page for new repositories makes.
_FRONT_MATTER = re.compile(rb"\s*(---\r?\n.*?\n---)?\s*", re.DOTALL)
_TARGETS: dict[str, type[HubTarget | KaggleTarget | FolderTarget]] = {
    "hf": HubTarget,
    "kaggle": KaggleTarget,
    "file": FolderTarget,
}


@dataclass(frozen=True)
class Plan:
    """What publishing would do. remarks: what the hub cannot do and what stays there, in words."""

    address: str
    files: tuple[Change, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """What publishing did.

    address: with the commit or version, for from_preset. sent: the Hub: files that were new or changed; elsewhere all.
    bytes_sent: their size; what arrived in an earlier attempt that broke off is counted too, but not sent again.
    """

    address: str
    url: str | None
    sent: tuple[str, ...]
    bytes_sent: int
    unchanged: bool
    remarks: tuple[str, ...]


def check_address(address: str, revision: str | None = None) -> Target:
    """What an address means, without a look at it. Raises InputError for what cannot be published to."""
    scheme, _, rest = address.partition("://")
    if scheme not in _TARGETS:
        raise InputError(
            f"{address!r} is nothing to publish to; give hf://owner/name, kaggle://owner/model/framework/variation "
            "or file:///folder/name"
        )
    place = rest.rstrip("/")
    if "@" in place.rpartition("/")[2]:
        place, _, named = place.rpartition("@")
        if revision is not None and named != revision:
            raise InputError(f"{address} names one revision and revision={revision!r} another; give one of them")
        revision = named
    if revision is not None and not re.fullmatch(r"\w[\w.-]*", revision, re.ASCII):
        raise InputError(f"revision {revision!r}: give a name of letters, digits, dots, dashes and underscores")
    return _TARGETS[scheme].parse(address, place, revision)


def plan(
    folder: str | os.PathLike[str], address: str, *, private: bool = True, revision: str | None = None,
    licence: str | None = None, token: str | None = None,
) -> Plan:  # fmt: skip
    """What publish_folder would do. Writes nothing; where the hub cannot be reached, the files are not compared."""
    target = check_address(address, revision)
    files = _collect(Path(folder))
    try:
        there = target.look(Path(folder), token)
        files, remarks = _prepare(files, there, target, token)
    except DownloadError as error:
        changes = [Change(file.name, file.size, "not compared") for file in _with_sums(files)]
        return Plan(target.address, tuple(changes), (f"not compared with what is there: {error}",))
    remarks += target.check(files, there, private, licence)
    return Plan(target.address, tuple(_compare(files, there, target)), tuple(remarks))


def publish_folder(
    folder: str | os.PathLike[str], address: str, *, private: bool = True, revision: str | None = None,
    message: str | None = None, licence: str | None = None, token: str | None = None,
    digests: Mapping[str, str] | None = None,
) -> Published:  # fmt: skip
    """Make what is at the address equal to the folder, in one step, and nothing if it is equal already.

    SHA256SUMS, the checksums of all files, goes with them. In a repository of the Hub only weights that are out of date
    are removed; a README that people have edited there stays.

    private: True refuses to publish where everybody can read; False leaves what is private private, and says so.
    revision: the Hub: a branch, made from main where it is missing; a shared folder: `name@revision` beside `name`.
    message: of the commit, or the version's notes. licence: as the Hub spells it. token: instead of the saved login.
    digests: the sha256 of files, by name, as far as it is known already.

    Raises InputError for a folder or address that cannot be used, DownloadError when the hub refuses or the transfer
    breaks off; what was published before is then as it was.
    """
    target = check_address(address, revision)
    files = _collect(Path(folder), digests or {})
    there = target.look(Path(folder), token)
    files, remarks = _prepare(files, there, target, token)
    remarks += target.check(files, there, private, licence)
    shipment = Shipment(files, _compare(files, there, target), private, message, licence, token)
    if removed := shipment.states("removed"):
        remarks.append(f"removed there, as out of date: {listed(removed)}")
    new = shipment.states("new", "changed")
    if there.version is not None and not new and not removed:
        return Published(*target.published(there.version), (), 0, True, tuple(remarks))
    version = target.send(shipment, there)
    sent = [file for file in files if target.whole or file.name in new]
    names, size = tuple(file.name for file in sent), sum(file.size for file in sent)
    return Published(*target.published(version), names, size, False, tuple(remarks))


# --- what is sent ---------------------------------------------------------------------------------------------------


def _collect(folder: Path, digests: Mapping[str, str] = MappingProxyType({})) -> list[File]:
    """The files of a folder, by name, but for an old SHA256SUMS."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    paths.pop(MANIFEST, None)
    files: list[File] = []
    try:
        with progress("checksums", sum(path.stat().st_size for path in paths.values())) as show:
            for name, path in sorted(paths.items()):
                files.append(File(name, path.stat().st_size, digests.get(name) or sha256_of(path), path))
                show(sum(file.size for file in files), 0)
    except OSError as error:
        raise InputError(f"{folder} could not be read: {error}") from error
    return files


def _with_sums(files: Sequence[File]) -> list[File]:
    sums = "".join(f"{file.sha256}  {file.name}\n" for file in files).encode()
    return [*files, File(MANIFEST, len(sums), hashlib.sha256(sums).hexdigest(), sums)]


def _prepare(files: list[File], there: There, target: Target, token: str | None) -> tuple[list[File], list[str]]:
    """The files to publish, SHA256SUMS among them; and remarks on what stays as it is there."""
    if not isinstance(target, HubTarget):
        return _with_sums(files), []
    remarks = []
    if stays := kinds(there.files) - kinds([file.name for file in files]):
        remarks.append(
            f"{target.address} holds {stays.pop()}, which stays there. Where both are, transformers with PEFT loads "
            "the adapter, on its base model; if that is not meant, remove one of them, or publish to another name"
        )
    if (card := _edited_card(files, there, target, token)) is not None:
        files = [card if file.name == card.name else file for file in files]
        remarks.append(
            f"{card.name} was edited there and is kept; for one written anew remove it there and publish again"
        )
    return _with_sums(files), remarks


def _edited_card(files: Sequence[File], there: There, target: HubTarget, token: str | None) -> File | None:
    """The card that is there, where people have made it theirs and ours is only a generated one."""
    ours, digest = next((file for file in files if file.name == "README.md"), None), there.files.get("README.md")
    if ours is None or digest is None or ours.matches(digest) or GENERATED.encode() not in ours.read():
        return None
    text = target.read(ours.name, there, token)
    if GENERATED.encode() in text or _FRONT_MATTER.fullmatch(text):
        return None
    return File(ours.name, len(text), hashlib.sha256(text).hexdigest(), text)


def _compare(files: Sequence[File], there: There, target: Target) -> list[Change]:
    changes = []
    for file in files:
        digest = there.files.get(file.name)
        state = "new" if digest is None else "unchanged" if file.matches(digest) else "changed"
        changes.append(Change(file.name, file.size, state))
    names = {file.name for file in files}
    # People keep files of their own beside a model, or adapters; but its old weights would mislead loaders.
    stale = WEIGHTS.fullmatch if "a model" in kinds(names) else lambda name: None
    gone = sorted(there.files.keys() - names)
    return changes + [Change(name, 0, "removed") for name in gone if target.whole or stale(name)]


__all__ = ["Change", "Plan", "Published", "Target", "check_address", "plan", "publish_folder"]
