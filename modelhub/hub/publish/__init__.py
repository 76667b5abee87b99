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
from modelhub.hub.publish.base import OURS, Change, File, Shipment, Target, There, listed
from modelhub.hub.publish.huggingface import HubTarget
from modelhub.hub.publish.kaggle import KaggleTarget
from modelhub.hub.publish.shared_folder import FolderTarget
from modelhub.hub.sources.base import progress, sha256_of
from modelhub.hub.sources.folder import MANIFEST

_LARGEST = 50_000_000_000  # bytes of one file that the Hugging Face Hub takes
_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
_TARGETS: dict[str, type[HubTarget | KaggleTarget | FolderTarget]] = {
    "hf": HubTarget,
    "kaggle": KaggleTarget,
    "file": FolderTarget,
}


@dataclass(frozen=True)
class Plan:
    """What publishing would do. remarks: what the hub cannot do and what is left out, in words."""

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
    files, remarks = _collect(Path(folder))
    try:
        there = target.look(Path(folder), token)
    except DownloadError as error:
        changes = [Change(file.name, file.size, "not compared") for file in files]
        return Plan(target.address, tuple(changes), (*remarks, f"not compared with what is there: {error}"))
    remarks += target.check(files, there, private, licence)
    return Plan(target.address, tuple(_compare(files, there, target)), tuple(remarks))


def publish_folder(
    folder: str | os.PathLike[str], address: str, *, private: bool = True, revision: str | None = None,
    message: str | None = None, licence: str | None = None, token: str | None = None,
    digests: Mapping[str, str] | None = None,
) -> Published:  # fmt: skip
    """Make what is at the address equal to the folder, in one step, and nothing if it is equal already.

    SHA256SUMS, the checksums of all files, goes with them. Symbolic links, hidden files and pickles do not. In a
    repository of the Hub, files of kinds that modelhub does not write stay.

    private: True refuses to publish where everybody can read; False leaves what is private private, and says so.
    revision: the Hub: a branch, made from main where it is missing; a shared folder: `name@revision` beside `name`.
    message: of the commit, or the version's notes. licence: as the Hub spells it. token: instead of the saved login.
    digests: the sha256 of files, by name, as far as it is known already.

    Raises InputError for a folder or address that cannot be used, DownloadError when the hub refuses or the transfer
    breaks off; what was published before is then as it was.
    """
    target = check_address(address, revision)
    files, remarks = _collect(Path(folder), digests or {})
    there = target.look(Path(folder), token)
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


def _collect(folder: Path, digests: Mapping[str, str] = MappingProxyType({})) -> tuple[list[File], list[str]]:
    """The files to publish, SHA256SUMS among them, by name; and a remark on those that are not."""
    found: list[tuple[str, Path]] = []
    left_out: list[str] = []
    for parent, folders, names in os.walk(folder):
        for path in [Path(parent, name) for name in sorted([*folders, *names])]:
            name = path.relative_to(folder).as_posix()
            if reason := _unwanted(path, name):
                if OURS.fullmatch(name):
                    raise InputError(
                        f"{folder / name} is {reason}, which is never published, and without it nothing would load. "
                        "Save the model again with save_to_preset or save_adapter, and publish that folder"
                    )
                left_out.append(f"{name} ({reason})")
                folders[:] = [item for item in folders if item != path.name]
            elif path.is_file() and name != MANIFEST:
                found.append((name, path))
    names = [name for name, _ in found]
    if not {"config.json", "adapter_config.json"} & {*names} or not any(x.endswith(".safetensors") for x in names):
        raise InputError(
            f"{folder} is no folder of a model or an adapter: expected config.json or adapter_config.json and "
            f".safetensors, found {listed(names) or 'nothing to publish'}. Write one with save_to_preset or "
            "save_adapter"
        )
    files: list[File] = []
    try:
        with progress("checksums", sum(path.stat().st_size for _, path in found)) as show:
            for name, path in sorted(found):
                files.append(File(name, path.stat().st_size, digests.get(name) or sha256_of(path), path))
                show(sum(file.size for file in files), 0)
    except OSError as error:
        raise InputError(f"{folder} could not be read: {error}") from error
    sums = "".join(f"{file.sha256}  {file.name}\n" for file in files).encode()
    files.append(File(MANIFEST, len(sums), hashlib.sha256(sums).hexdigest(), sums))
    return files, [f"not sent: {listed(left_out)}"] if left_out else []


def _unwanted(path: Path, name: str) -> str | None:
    """Why a file or folder is never sent."""
    if path.is_symlink():
        return "a symbolic link"
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return None
    if path.suffix.lower() in _PICKLES:
        return "a pickle"
    if not path.is_file() or re.search(r"[\\\x00-\x1f]", name):
        return "no plain file"
    return "over 50 GB" if path.stat().st_size > _LARGEST else None


def _compare(files: Sequence[File], there: There, target: Target) -> list[Change]:
    changes = []
    for file in files:
        digest = there.files.get(file.name)
        state = "new" if digest is None else "unchanged" if file.matches(digest) else "changed"
        changes.append(Change(file.name, file.size, state))
    gone = sorted(there.files.keys() - {file.name for file in files})
    # Beside a model people keep files of their own; old ones of the kinds written here would mislead loaders.
    return changes + [
        Change(name, 0, "removed")
        for name in gone
        if target.whole or (OURS.fullmatch(name) and name not in ("README.md", "NOTICE"))
    ]


__all__ = ["Change", "Plan", "Published", "Target", "check_address", "plan", "publish_folder"]
