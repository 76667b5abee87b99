"""Models on Kaggle, through kagglehub."""

import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from modelhub.errors import DownloadError, InputError, PresetNotFound
from modelhub.hub.sources.base import Options, Unreachable, cache_root, check_resolves, needed, sha256_of
from modelhub.hub.sources.entry import (
    RETRY_STATUS,
    check_room,
    fill_entry,
    find_entry,
    is_inside,
    retry_after,
    with_retries,
)
from modelhub.hub.sources.folder import MANIFEST, check_sums, read_sums

_ADDRESS = re.compile(r"kaggle://(?P<model>[\w-][\w.-]*(/[\w-][\w.-]*){3})(/(?P<version>[1-9]\d*))?", re.ASCII)
_VERSION = re.compile(r"[1-9]\d*", re.ASCII)
_PAGE = 200  # files in one answer of the listing

_environment = threading.Lock()
_T = TypeVar("_T")


@dataclass(frozen=True)
class KaggleSource:
    """One variation of a model on Kaggle; revision is the version's number (None: the newest).

    Options.token is not sent there: it is for the Hugging Face Hub. kagglehub finds the credentials for Kaggle.
    """

    model: str  # "owner/model/framework/variation"
    revision: str | None = None
    verified: bool = False

    @classmethod
    def parse(cls, address: str, verified: bool = False) -> "KaggleSource":
        """From kaggle://owner/model/framework/variation[/version]. Raises PresetNotFound for anything else."""
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise PresetNotFound(
                f"{address!r} is no address on Kaggle; write kaggle://owner/model/framework/variation[/version]"
            )
        return cls(match["model"], match["version"], verified)

    def takes(self, revision: str) -> bool:
        return _VERSION.fullmatch(revision) is not None

    def address(self, path: Path) -> str:
        """Where the files at `path` came from, with the version."""
        return f"kaggle://{self.model}/{path.name.rpartition('+')[2]}"

    def find(self, options: Options) -> Path | None:
        """The version that is asked for in the cache, the newest one there if none is; None if it is not complete."""
        if (version := self._version(options)) is not None:
            return self._cached(version, options)
        names = os.listdir(self._root(options)) if self._root(options).is_dir() else []
        stem = self._entry("", options).name
        versions = {name.removeprefix(stem) for name in names if name.startswith(stem)}
        for version in sorted(filter(str.isdecimal, versions), key=int, reverse=True):
            if path := self._cached(version, options):
                return path
        return None

    def fetch(self, options: Options) -> Path:
        """Download what is needed of the version and return its folder.

        Where Kaggle does not tell the newest version, for want of a network or a login, a cached one serves, with a
        warning.

        What Kaggle's storage says of a file's MD5 is checked by kagglehub; where the version holds SHA256SUMS, the
        files are checked against that too. Raises PresetNotFound (no such model or version), DownloadError (licence
        not accepted, wrong bytes, disk full) and Unreachable.
        """
        version = self._version(options)
        if version is None:
            found = self.find(options)
            try:
                version = self._newest(patient=found is None)
            except (DownloadError, PresetNotFound) as error:
                if found is None:
                    raise
                warnings.warn(f"{error}. Taken as it is in the cache: {self.address(found)}", stacklevel=2)
                return found
        if found := self._cached(version, options):
            return found
        folder = self._entry(version, options)
        return fill_entry(
            folder, self.address(folder), options.weights, lambda work: self._download(version, options, work)
        )

    def _version(self, options: Options) -> str | None:
        asked = options.revision
        if asked is not None and not self.takes(asked):
            raise InputError(f"revision={asked!r} was given; on Kaggle a revision is a version's number, such as '3'")
        return asked or self.revision

    def _root(self, options: Options) -> Path:
        return cache_root(options.cache_dir) / "kaggle"

    def _entry(self, version: str, options: Options) -> Path:
        return self._root(options) / f"{self.model.replace('/', '+')}+{version}"  # no part of a handle has a plus

    def _cached(self, version: str, options: Options) -> Path | None:
        return find_entry(self._entry(version, options), options.weights)

    def _newest(self, patient: bool) -> str:
        from kagglesdk.models.types.model_api_service import ApiGetModelInstanceRequest

        def ask(client: Any) -> int:
            return client.get_model_instance(self._request(ApiGetModelInstanceRequest)).version_number

        return str(self._call(ask, patient))

    def _listing(self, version: str) -> dict[str, int]:
        """{path: bytes} of a version's files. kagglehub lists the first 25 at most: this goes through the pages."""
        from kagglesdk.models.types.model_api_service import ApiListModelInstanceVersionFilesRequest

        request = self._request(ApiListModelInstanceVersionFilesRequest)
        request.version_number, request.page_size = int(version), _PAGE
        files: dict[str, int] = {}
        while True:
            page = self._call(lambda client: client.list_model_instance_version_files(request))
            files |= {file.name: file.size for file in page.files}
            if not page.next_page_token or page.next_page_token == request.page_token:
                break
            request.page_token = page.next_page_token
        if outside := [name for name in files if not is_inside(name)]:
            raise DownloadError(f"kaggle://{self.model}/{version} lists files outside its folder: {outside[:5]}")
        return files

    def _download(self, version: str, options: Options, work: Path) -> dict[str, str]:
        import kagglehub

        address = f"kaggle://{self.model}/{version}"
        sizes = self._listing(version)
        wanted = needed(sizes, options.weights, address)
        listed = [MANIFEST] if MANIFEST in sizes else []
        check_room(work, sum(sizes[name] for name in wanted), address)
        handle = f"{self.model}/{version}"
        paths: dict[str, Path] = {}
        with _client_settings(work):
            for name in wanted + listed:
                paths[name] = Path(self._tried(partial(kagglehub.model_download, handle, name)))
                size = paths[name].stat().st_size
                if sizes[name] not in (size, 0):  # 0: Kaggle does not say
                    paths[name].unlink()  # else the next attempt would take it for complete
                    raise DownloadError(
                        f"{address}: {name} has {size:,} bytes, and Kaggle lists it with {sizes[name]:,}; it was "
                        "removed. Try again"
                    )
        sums = {name: sha256_of(paths[name]) for name in wanted}
        if listed:
            try:
                check_sums(sums, read_sums(paths[MANIFEST].read_bytes(), address), address)
            except DownloadError:
                for path in paths.values():  # else the next attempt would take them for complete
                    path.unlink(missing_ok=True)
                raise
        for name in wanted:
            target = work / "files" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            paths[name].replace(target)
        return sums

    def _request(self, kind: Callable[[], Any]) -> Any:
        from kagglehub.handle import parse_model_handle

        handle = parse_model_handle(self.model)
        request = kind()
        request.owner_slug, request.model_slug = handle.owner, handle.model
        request.instance_slug = handle.variation
        try:
            request.framework = handle.framework_enum()
        except ValueError:
            raise PresetNotFound(
                f"kaggle://{self.model}: Kaggle knows no framework {handle.framework!r}; see {self._page}"
            ) from None
        return request

    def _call(self, ask: Callable[[Any], _T], patient: bool = True) -> _T:
        from kagglehub.clients import build_kaggle_client
        from kagglehub.exceptions import handle_call
        from kagglesdk.kaggle_env import get_endpoint, get_env

        check_resolves(get_endpoint(get_env()))

        def attempt() -> _T:
            with build_kaggle_client() as client:
                return handle_call(lambda: ask(client.models.model_api_client))

        with _client_settings(None):
            return self._tried(attempt, patient)

    def _tried(self, attempt: Callable[[], _T], patient: bool = True) -> _T:
        """attempt(), with its errors in words. kagglehub itself tries once; patient: again after errors that pass."""
        import requests
        from kagglehub.exceptions import DataCorruptionError

        address = f"kaggle://{self.model}"
        try:
            return with_retries(attempt, _pause_after) if patient else attempt()
        except DataCorruptionError as error:
            raise DownloadError(
                f"{address} arrived with wrong bytes ({' '.join(str(error).split())}); the file was removed. Try again"
            ) from error
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status in (401, 403):
                raise DownloadError(
                    f"{address} is private, or its licence must be accepted once. Open {self._page}, accept it, then "
                    "log in on this machine with the same account: kagglehub.login() in Python, or "
                    "export KAGGLE_API_TOKEN=... with a token from https://www.kaggle.com/settings/api"
                ) from None
            if status == 404:
                raise PresetNotFound(
                    f"Kaggle knows no {address} in the version that is asked for, or it is private and you are not "
                    f"logged in (kagglehub.login()). Check framework, variation and version at {self._page}"
                ) from None
            raise Unreachable(f"{address}: Kaggle answers with an error ({_plain(error)}). Try again later") from error
        except requests.RequestException as error:
            raise Unreachable(
                f"{address} could not be downloaded ({_plain(error)}). Check the network and try again; what arrived "
                "is kept"
            ) from error
        except ValueError as error:  # its credentials file cannot be read
            raise DownloadError(f"{address}: {error}") from None

    @property
    def _page(self) -> str:
        owner, model, _, _ = self.model.split("/")
        return f"https://www.kaggle.com/models/{owner}/{model}"


def _plain(error: Exception) -> str:
    return re.sub(r"\?\S*", "", str(error))  # the addresses of its storage are signed: whoever has one can download


def _pause_after(error: Exception) -> float | None:
    import requests

    if isinstance(error, requests.HTTPError):
        response = error.response
        return retry_after(response.headers) if response is not None and response.status_code in RETRY_STATUS else None
    passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return 0.0 if isinstance(error, passing) else None


@contextmanager
def _client_settings(cache: Path | None) -> Iterator[None]:
    """kagglehub with its cache in that folder, over https also in notebooks, and quiet but for its progress bar.

    It reads these variables at each call. Not its output_dir: it cannot resume there.
    """
    import kagglehub.clients

    # Its hint at newer versions goes to stdout, which is the caller's.
    kagglehub.clients.already_printed_version_warning = True
    logger = logging.getLogger("kagglehub")
    settings = {"DISABLE_KAGGLE_CACHE": "1", "DISABLE_COLAB_CACHE": "1"}
    if cache is not None:
        settings["KAGGLEHUB_CACHE"] = str(cache)
    with _environment:
        before = {name: os.environ.get(name) for name in settings}
        level = logger.level
        os.environ.update(settings)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
