"""Entries of the cache that appear whole, for sources that have no cache of their own.

cache_root()/<kind>/<key>/ holds the files of one address in one version, and beside them source.json:
{"address": "...", "files": {path: sha256}, "weights": true}. An entry is put together in <key>.partial, which a process
that was interrupted leaves behind for the next one to go on with, and then renamed.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from modelhub.errors import CheckpointError, DownloadError, PresetNotFound

RECORD = "source.json"
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
PAUSES = [1.0, 2.0, 4.0, 8.0, 16.0]  # seconds before the second, third, ... attempt
LONGEST_PAUSE = 60.0  # a server that asks for more than this is left alone, and the user told

_OTHER_PLACE = "Make room there, or choose another folder with cache_dir= or $MODELHUB_CACHE"
_T = TypeVar("_T")


def find_entry(folder: Path, weights: bool) -> Path | None:
    """The entry where it is complete, with its weights where they are asked for; else None."""
    record = read_record(folder)
    if record is None or (weights and not record["weights"]):
        return None
    return folder if all(os.path.isfile(folder / name) for name in record["files"]) else None


def read_record(folder: Path) -> dict[str, Any] | None:
    """What source.json says of an entry; None where there is none."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return record if isinstance(record["files"], dict) and {"address", "weights"} <= record.keys() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def fill_entry(folder: Path, address: str, weights: bool, fill: Callable[[Path], Mapping[str, str]]) -> Path:
    """The entry, made first where it is not complete; processes that ask at the same time wait for the first.

    fill(work) puts the files into work / "files" and answers {path: sha256}; what an earlier attempt left in `work` is
    still there. Raises what fill raises, and DownloadError where the cache cannot be written.
    """
    from filelock import FileLock

    from modelhub.hub.files import replace_folder

    if found := find_entry(folder, weights):
        return found
    work = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if found := find_entry(folder, weights):
                return found
            files = work / "files"
            files.mkdir(parents=True, exist_ok=True)
            sums = dict(fill(work))
            for path in files.rglob("*"):  # an earlier attempt may have wanted more
                if path.is_file() and path.relative_to(files).as_posix() not in sums:
                    path.unlink()
            record = {"address": address, "files": sums, "weights": weights}
            (files / RECORD).write_text(json.dumps(record, indent=2))
            replace_folder(files, folder)
            shutil.rmtree(work, ignore_errors=True)
            return folder
    except (DownloadError, CheckpointError, PresetNotFound):
        raise
    except OSError as error:
        raise DownloadError(
            f"{address} cannot be written to the cache {folder.parent} ({error}). {_OTHER_PLACE}"
        ) from error


def check_room(work: Path, size: int, what: str) -> None:
    """Raises DownloadError where `size` bytes, less what is in `work` already, do not fit on its disk."""
    held = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    if (free := shutil.disk_usage(work).free) < size - held:
        raise DownloadError(
            f"{what} takes {size - held:,} bytes more, and {work.parent} has room for {free:,}. {_OTHER_PLACE}"
        )


def is_inside(name: str) -> bool:
    """Whether a path that a server, an archive or a manifest names stays in its folder, on every system."""
    return (
        bool(name)
        and not re.search(r"[\\:\x00-\x1f]", name)  # a colon: drives, and streams of NTFS
        and name == str(PurePosixPath(name)) != "."  # no empty part, no "."
        and not name.startswith("/")
        and ".." not in name.split("/")
    )


def with_retries(attempt: Callable[[], _T], pause_after: Callable[[Exception], float | None]) -> _T:
    """attempt(), again after errors that may pass.

    pause_after(error) is the pause in seconds that the server asked for, 0 if it asked for none, None for an error
    that stays.
    """
    for pause in PAUSES:
        try:
            return attempt()
        except Exception as error:
            asked = pause_after(error)
            if asked is None or asked > LONGEST_PAUSE:
                raise
            time.sleep(max(asked, pause))
    return attempt()


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a Retry-After header asks for (RFC 9110, 10.2.3: a number or a date); 0 without one."""
    from email.utils import parsedate_to_datetime

    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError):
        return 0.0
