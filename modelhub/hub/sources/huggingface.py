"""Repositories on the Hugging Face Hub, through huggingface_hub and in its cache, which transformers shares.

What has arrived is compared with the checksums that the Hub states, and a record beside it keeps what was compared.
So a cached preset is found without the client, whose import alone takes longer than all the rest.

Layout of the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from modelhub.errors import DownloadError, ModelhubError, PresetNotFound
from modelhub.hub.sources.base import Options, Unreachable, check_resolves, client_cache, needed, sha256_of
from modelhub.hub.sources.entry import RETRY_STATUS, is_inside, retry_after, with_retries

RECORDS = "modelhub"  # our folder inside the client's folder of a repository

_ADDRESS = re.compile(
    r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(?P<file>[^@\s\\]+\.gguf))?(@(?P<revision>[^@\s]+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's, or that of Git LFS
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
_THREADS = 4
_T = TypeVar("_T")


@dataclass(frozen=True)
class HubSource:
    """A repository on the Hugging Face Hub; revision is a branch, a tag or a commit (None: the main branch).

    file: the path of one .gguf file in it, which then is the preset.
    """

    repo: str  # "owner/name"
    revision: str | None = None
    verified: bool = False
    file: str | None = None

    @classmethod
    def parse(cls, address: str, verified: bool = False) -> "HubSource":
        """From hf://owner/name[/file.gguf][@revision]. Raises PresetNotFound for anything else."""
        match = _ADDRESS.fullmatch(address)
        if match is None or "--" in match["repo"] or ".." in address:  # by the Hub's rules; git's for revisions
            raise PresetNotFound(f"{address!r} is no address on the Hub; write hf://owner/name[/file.gguf][@revision]")
        return cls(match["repo"], match["revision"], verified, match["file"])

    def takes(self, revision: str) -> bool:
        return True

    def address(self, path: Path) -> str:
        """Where the files at `path` came from; the folder of a snapshot has the commit's name."""
        folder = path if self.file is None else path.parents[self.file.count("/")]
        return f"{self._name}@{folder.name}"

    def find(self, options: Options) -> Path | None:
        """The complete, verified snapshot in the cache, or None. Does not import the client.

        Of a branch the newest one that is complete: transformers, or a look at the config alone, may have moved the
        branch to a commit of which not all is here.
        """
        found = (self._complete(commit, options) for commit in self._commits(options))
        return next(filter(None, found), None)

    def adopt(self, options: Options) -> Path | None:
        """For want of a network: the snapshot that transformers has fetched, its bytes checked; None if not whole.

        The client names a file after the checksum that the Hub stated. But what else the Hub has, such as a tokenizer,
        cannot be seen here: so this is recorded by itself, and `fetch` completes it.
        """
        for commit in self._commits(options):
            folder = self._folder(options) / "snapshots" / commit
            record = self._records(commit, options)[0].with_suffix(".adopted.json")
            with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, ModelhubError):
                if not _is_recorded(folder, record):
                    _write(record, json.dumps(self._checked(folder, options.weights), indent=1))
                return folder / self.file if self.file else folder
        return None

    def fetch(self, options: Options) -> Path:
        """Download what is missing or out of date, compare it with the Hub's checksums, and return where it is.

        A cached commit takes no network; without a network an earlier snapshot of a branch serves. Raises
        PresetNotFound (no such repository or revision, no model), CheckpointError (only pickles), DownloadError
        (licence not accepted, wrong bytes, disk full) and Unreachable.
        """
        found = self.find(options)
        wanted = self._wanted(options)
        if found and _COMMIT.fullmatch(wanted):
            return found
        from huggingface_hub import HfApi, constants, errors

        try:
            check_resolves(constants.ENDPOINT)
        except Unreachable:
            if found := found or self.adopt(options):
                return found
            raise
        api = HfApi(token=options.token)
        commit = wanted
        try:
            if not _COMMIT.fullmatch(wanted):
                ask = functools.partial(api.model_info, self.repo, revision=wanted)
                commit = (ask() if found else _patiently(ask)).sha or ""
        except Exception as error:
            if not isinstance(error, errors.RevisionNotFoundError) and (found := found or self.adopt(options)):
                return found
            raise self._explain(error, options) from error
        try:
            if wanted == commit and (self._folder(options) / "snapshots" / commit).is_dir():
                api.model_info(self.repo, revision=commit)  # without a network the client's listing tries for 20 s
        except Exception as error:
            if isinstance(self._explain(error, options), Unreachable) and (found := self.adopt(options)):
                return found
        try:
            if not _COMMIT.fullmatch(commit):
                raise DownloadError(f"{self._name}: the Hub answers with {commit[:100]!r}, which is no commit")
            path = self._complete(commit, options) or self._download(api, commit, options)
        except Exception as error:
            explained = self._explain(error, options)
            if wanted == commit and isinstance(explained, Unreachable) and (found := self.adopt(options)):
                return found
            raise explained from error
        if wanted != commit:
            _write(self._folder(options) / "refs" / wanted, commit)
            if self._complete(commit, options):  # else the cache is for reading only
                _write(self._refs(wanted, options)[0], commit)
        return path

    @property
    def _name(self) -> str:
        return f"hf://{self.repo}/{self.file}" if self.file else f"hf://{self.repo}"

    def _wanted(self, options: Options) -> str:
        return options.revision or self.revision or "main"

    def _folder(self, options: Options) -> Path:
        return client_cache(options.cache_dir) / f"models--{self.repo.replace('/', '--')}"

    def _kinds(self, options: Options) -> list[str]:
        """What a record may be of, to be of use here; the first is what is asked for."""
        return [quote(self.file, safe="")] if self.file else ["model"] if options.weights else ["config", "model"]

    def _records(self, commit: str, options: Options) -> list[Path]:
        """Any of them tells that what is asked for is complete; the first is the one to write."""
        return [self._folder(options) / RECORDS / commit / f"{kind}.json" for kind in self._kinds(options)]

    def _refs(self, branch: str, options: Options) -> list[Path]:
        """Files that hold the commit which was last fetched, from this branch, with all that is asked for."""
        folder = self._folder(options) / RECORDS / "refs" / quote(branch, safe="")
        return [folder / kind for kind in self._kinds(options)]

    def _commits(self, options: Options) -> list[str]:
        """Those in the cache that are meant: of a branch what the client takes for its head, then what we fetched."""
        wanted = self._wanted(options)
        if _COMMIT.fullmatch(wanted):
            return [wanted]
        commits = []
        for ref in [self._folder(options) / "refs" / wanted, *self._refs(wanted, options)]:
            with suppress(OSError, ValueError):
                commits.append(ref.read_text().strip())
        return [commit for commit in dict.fromkeys(commits) if _COMMIT.fullmatch(commit)]

    def _complete(self, commit: str, options: Options) -> Path | None:
        folder = self._folder(options) / "snapshots" / commit
        if any(_is_recorded(folder, record) for record in self._records(commit, options)):
            return folder / self.file if self.file else folder
        return None

    def _checked(self, folder: Path, weights: bool) -> dict[str, dict[str, Any]]:
        """What to record of a snapshot that the client has made. Raises LookupError, or what `needed` does."""
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        names = {self.file} if self.file else {*needed(paths, weights, self._name)}
        if (index := "model.safetensors.index.json") in names:
            names |= {*json.loads(paths[index].read_bytes())["weight_map"].values()}
        blobs = {name: paths[name].resolve() for name in names}
        for name, blob in blobs.items():
            if not CHECKSUM.fullmatch(blob.name) or checksum_of(blob, blob.name) != blob.name:
                raise LookupError(f"{name} has the wrong bytes, or nothing tells which are right")
        return {name: {"size": blob.stat().st_size, "checksum": blob.name} for name, blob in blobs.items()}

    def _download(self, api: Any, commit: str, options: Options) -> Path:
        from concurrent.futures import ThreadPoolExecutor

        from filelock import FileLock
        from huggingface_hub import snapshot_download
        from huggingface_hub.hf_api import RepoFile

        tree = api.list_repo_tree(self.repo, recursive=True, revision=commit)
        files = {item.path: item for item in tree if isinstance(item, RepoFile) and is_inside(item.path)}
        if self.file and self.file not in files:
            ggufs = ", ".join(path for path in files if path.endswith(".gguf")) or "no .gguf file"
            raise PresetNotFound(f"hf://{self.repo} has no file {self.file}; it holds {ggufs}")
        names = [self.file] if self.file else needed(files, options.weights, self._name)
        repo = self._folder(options)
        snapshot = repo / "snapshots" / commit
        # Not always for writing: what others share is used, though nobody can keep a record that it was checked.
        if not os.access(repo, os.W_OK) and all(_is_whole(snapshot / name, files[name]) for name in names):
            return snapshot / self.file if self.file else snapshot
        lock = repo.parent / ".locks" / repo.name / "modelhub.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # two processes, one transfer
            if path := self._complete(commit, options):
                return path
            missing = [files[name] for name in names if not _is_whole(snapshot / name, files[name])]
            for file in missing:
                _discard(snapshot / file.path)
            _check_space(lock.parent, sum(file.size - _held(repo, file) for file in missing))
            right = {_checksum(file) for file in missing if self._fetch_large(file, commit, options)}
            if missing:
                patterns = [glob.escape(name) for name in names]
                _patiently(
                    lambda: snapshot_download(
                        self.repo, revision=commit, token=options.token, cache_dir=repo.parent, allow_patterns=patterns
                    )
                )
            for record in repo.glob(f"{RECORDS}/*/*.json"):  # of other commits, which share files with this one
                right |= {about["checksum"] for about in read_record(record).values()}
            new = [name for name in names if _checksum(files[name]) not in right]
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(lambda name: self._check(snapshot / name, files[name]), new))
            complete = {name: {"size": files[name].size, "checksum": _checksum(files[name])} for name in names}
            _write(self._records(commit, options)[0], json.dumps(complete, indent=1))
        return snapshot / self.file if self.file else snapshot

    def _fetch_large(self, file: Any, commit: str, options: Options) -> bool:
        """Bring a file of Git LFS to where the client then finds it; True: it is there, and its bytes are right.

        The client by itself goes on after a cut, but begins again in the next process. Where it can speak to Xet, it
        is faster at that than we are.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        speaks_xet = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
        if file.lfs is None or (file.xet_hash and speaks_xet):
            return False
        blob, part = _places(self._folder(options), file)
        if blob.exists():
            return False
        blob.parent.mkdir(parents=True, exist_ok=True)
        url = hf_hub_url(self.repo, file.path, revision=commit)

        def transfer() -> None:
            with open(part, "ab") as out:
                if out.tell() > file.size:
                    out.truncate(0)
                headers = build_hf_headers(token=options.token)
                http_get(
                    url, out, resume_size=out.tell(), headers=headers, expected_size=file.size,
                    displayed_filename=file.path,
                )  # fmt: skip

        _patiently(transfer)
        self._check(part, file)
        part.replace(blob)
        return True

    def _check(self, path: Path, file: Any) -> None:
        """Raises DownloadError and removes the file where its bytes are not those that the Hub has."""
        expected = _checksum(file)
        if (found := checksum_of(path, expected)) == expected:
            return
        _discard(path)
        raise DownloadError(
            f"hf://{self.repo}: {file.path} has the wrong bytes: checksum {found}, on the Hub {expected}; it was "
            "removed. Try again; if it stays, something between this machine and the Hub changes files"
        )

    def _explain(self, error: Exception, options: Options) -> ModelhubError:
        from huggingface_hub import constants, errors

        if isinstance(error, ModelhubError):
            return error
        page = f"{constants.ENDPOINT}/{self.repo}"
        if isinstance(error, errors.GatedRepoError):
            return DownloadError(
                f"hf://{self.repo} is gated: its licence must be accepted once. Open {page}, accept it, then log in on "
                "this machine with the same account: hf auth login (or give token=...)"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return PresetNotFound(
                f"the Hub knows no repository {self.repo!r}, or it is private and your token does not open it. "
                f"Check the name at {page}; for a private one log in: hf auth login (or give token=...)"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            wanted = self._wanted(options)
            return PresetNotFound(f"hf://{self.repo} has no branch, tag or commit {wanted!r}; see {page}")
        cache = client_cache(options.cache_dir)
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            return DownloadError(
                f"{self._name} cannot be written to the cache {cache} ({error}). "
                "Make room there, or choose another folder with cache_dir= or $MODELHUB_CACHE"
            )
        # Whatever else its client raises: every HTTP library has its own classes.
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        reason = re.sub(
            r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", reason
        )  # the query of a CDN's address opens the file
        return Unreachable(
            f"{self._name} could not be downloaded and is not complete in the cache {cache} "
            f"({reason}). Check the network and try again"
        )


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """{file: {"size": bytes, "checksum": hex digits}} of the files that a record says are right; empty without one."""
    try:
        files = json.loads(path.read_text())
        return {name: {"size": about["size"], "checksum": str(about["checksum"])} for name, about in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def checksum_of(path: Path, like: str) -> str:
    """A file's checksum of the kind that `like` is: sha256 of its bytes (Git LFS), or git's sha1 of a blob."""
    if len(like) == 64:
        return sha256_of(path)
    with open(path, "rb") as file:
        header = b"blob %d\0" % os.fstat(file.fileno()).st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def _is_recorded(folder: Path, record: Path) -> bool:
    """Only what had the right checksum is recorded: its size is enough to know that it is still whole."""
    files = read_record(record)
    try:
        return bool(files) and all(os.stat(folder / name).st_size == about["size"] for name, about in files.items())
    except OSError:
        return False


def _checksum(file: Any) -> str:
    """What the Hub says it must be. Raises DownloadError where that is no checksum: it becomes a file's name."""
    checksum: str = file.lfs.sha256 if file.lfs else file.blob_id
    if not CHECKSUM.fullmatch(checksum):
        raise DownloadError(f"the Hub states {checksum[:100]!r} as the checksum of {file.path}, which is none")
    return checksum


def _places(repo: Path, file: Any) -> tuple[Path, Path]:
    """Where the client keeps the file's bytes, and where we keep those that have arrived so far."""
    blob = repo / "blobs" / _checksum(file)
    return blob, blob.with_name(f"{blob.name}.modelhub.incomplete")


def _held(repo: Path, file: Any) -> int:
    """Bytes of it that are here."""
    return next((path.stat().st_size for path in _places(repo, file) if path.exists()), 0)


def _is_whole(path: Path, file: Any) -> bool:
    try:
        return bool(path.stat().st_size == file.size)
    except OSError:
        return False


def _discard(path: Path) -> None:
    path.resolve().unlink(missing_ok=True)  # a link's target first
    path.unlink(missing_ok=True)


def _patiently(call: Callable[[], _T]) -> _T:
    """call(), again where the server has too much to do or stumbles. For what the client does not repeat itself."""

    def pause_after(error: Exception) -> float | None:
        response = getattr(error, "response", None)
        if response is None or response.status_code not in RETRY_STATUS:
            return None
        return retry_after(response.headers)

    return with_retries(call, pause_after)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size / 1e9:.2f} GB are to come and {free / 1e9:.2f} GB are free")


def _write(path: Path, text: str) -> None:
    """All or nothing; without a word where the cache is for reading only: it only saves asking again."""
    with suppress(OSError):
        if path.is_file() and path.read_text() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_name(f"{path.name}.{os.getpid()}")
        work.write_text(text)
        work.replace(path)
