"""Models on Kaggle, through kagglehub.

Its client has no flag for who may see a model: it makes new ones private (is_private in models_helpers.py), and leaves
those that exist as they are. It numbers versions itself, and takes a licence only for the first one.
"""

import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from modelhub.errors import DownloadError, InputError, ModelhubError
from modelhub.hub.publish.base import File, Shipment, There, check_privacy, failed
from modelhub.hub.sources.base import sha256_of
from modelhub.hub.sources.folder import MANIFEST, read_sums

_LOGIN = "put a token from https://www.kaggle.com/settings/api into ~/.kaggle/access_token or $KAGGLE_API_TOKEN"
_MOST_FILES = 50  # more are zipped by the client, and could not be loaded one by one
# By the Hub's identifiers; https://github.com/Kaggle/kaggle-api/blob/main/documentation/models_metadata.md
_LICENCES = {
    "apache-2.0": "Apache 2.0",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-4.0": "Attribution 4.0 International (CC BY 4.0)",
    "cc-by-nc-4.0": "Attribution-NonCommercial 4.0 International (CC BY-NC 4.0)",
    "cc-by-nc-sa-4.0": "CC BY-NC-SA 4.0",
    "cc-by-sa-4.0": "CC BY-SA 4.0",
    "cc0-1.0": "CC0: Public Domain",
    "gemma": "Gemma",
    "gpl-3.0": "GPL 3",
    "mit": "MIT",
}


@dataclass(frozen=True)
class KaggleTarget:
    """A variation of a model."""

    handle: str  # "owner/model/framework/variation"
    whole: ClassVar[bool] = True

    @property
    def address(self) -> str:
        return f"kaggle://{self.handle}"

    @property
    def title(self) -> str:
        return self.handle.split("/")[1]

    @classmethod
    def parse(cls, address: str, place: str, revision: str | None) -> "KaggleTarget":
        """place: what follows kaggle://. Raises InputError."""
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+){3}", place, re.ASCII):
            what = "kaggle://owner/model/framework/variation, without a version: Kaggle numbers versions itself"
            raise InputError(f"{address!r} is nothing to publish to; write {what}")
        if revision is not None:
            raise InputError(f"revision={revision!r}: Kaggle numbers versions itself; leave it out")
        target = cls(place)
        with _client(target.address, None):
            try:
                target._handle().framework_enum()
            except ValueError:
                known = "transformers, pyTorch, jax, keras, tensorFlow2 and others"
                raise InputError(f"{address}: Kaggle has no framework {place.split('/')[2]!r}; has {known}") from None
        return target

    def look(self, folder: Path, token: str | None) -> There:
        """The files of the newest version, by the checksums that were published with it."""
        with _client(self.address, token) as kaggle, tempfile.TemporaryDirectory() as work:
            model = _known(lambda: kaggle.get_model(self._fill(_requests().ApiGetModelRequest())))
            if model is None:
                return There()
            instance = self._instance(kaggle)
            if instance is None:
                return There(private=bool(model.is_private))
            import kagglehub

            version = str(instance.version_number)
            handle = f"{self.handle}/{version}"
            path = _known(lambda: kagglehub.model_download(handle, MANIFEST, force_download=True, output_dir=work))
            files = {}
            if path:
                files = read_sums(Path(path).read_bytes(), f"kaggle://{handle}") | {MANIFEST: sha256_of(Path(path))}
            return There(version, files, bool(model.is_private), instance.license_name)

    def check(self, files: Sequence[File], there: There, private: bool, licence: str | None) -> list[str]:
        page = f"https://www.kaggle.com/models/{'/'.join(self.handle.split('/')[:2])}/settings"
        if len(files) > _MOST_FILES:
            raise InputError(
                f"{self.address}: {len(files)} files, and Kaggle's client sends more than {_MOST_FILES} only as one "
                "archive; save the model with a larger max_shard_size"
            )
        remarks = check_privacy(self.address, there, private, page)
        if there.private is None:
            made = "Kaggle's client cannot choose who sees a model: it makes new ones private"
            remarks.append(made if private else f"{made}; to make it public open {page}")
        name = _licence_name(licence)
        if licence and name is None:
            remarks.append(
                f"Kaggle's client knows no licence {licence!r}: choose it at {page}; the model card states it"
            )
        elif name and there.version and name != there.licence:
            found = there.licence or "none"
            remarks.append(f"Kaggle's client sets a licence only once: there it is {found}; to change it open {page}")
        return remarks

    def send(self, shipment: Shipment, there: There) -> str:
        """All files, as a new version; within one call the client goes on where a file's transfer broke off."""
        with _client(self.address, shipment.token) as kaggle, tempfile.TemporaryDirectory() as work:
            import kagglehub

            for file in shipment.files:  # what is in this folder is what is sent, whatever comes into the other one
                path = Path(work, file.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(file.content, bytes):
                    path.write_bytes(file.content)
                else:
                    path.symlink_to(file.content.resolve())
            name = _licence_name(shipment.licence)
            kagglehub.model_upload(self.handle, work, license_name=name, version_notes=shipment.message or "")
            version = int(there.version or 0) + 1
            instance = self._instance(kaggle)
            if instance is not None and instance.version_number >= version:  # else Kaggle is still at it
                version = instance.version_number
                self._check_sizes(kaggle, shipment, version)
            return str(version)

    def published(self, version: str) -> tuple[str, str | None]:
        return f"{self.address}/{version}", self._handle().with_version(int(version)).to_url()

    def _check_sizes(self, kaggle: Any, shipment: Shipment, version: int) -> None:
        # kagglehub 1.0 gives up on a transfer without an error.
        request = self._fill(_requests().ApiListModelInstanceVersionFilesRequest())
        request.version_number = version
        arrived: dict[str, int] = {}
        for _ in range(_MOST_FILES):  # pages
            page = kaggle.list_model_instance_version_files(request)
            arrived |= {file.name: file.size for file in page.files}
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        short = [file.name for file in shipment.files if arrived.get(file.name, file.size) != file.size]
        if short:
            raise DownloadError(
                f"{self.address}/{version}: {', '.join(short)} did not arrive whole, unnoticed by Kaggle's client. "
                "Delete this version on its page and run the same again"
            )

    def _handle(self) -> Any:
        from kagglehub.handle import parse_model_handle

        return parse_model_handle(self.handle)

    def _fill(self, request: Any) -> Any:
        handle = self._handle()
        request.owner_slug, request.model_slug = handle.owner, handle.model
        if hasattr(request, "instance_slug"):
            request.framework, request.instance_slug = handle.framework_enum(), handle.variation
        return request

    def _instance(self, kaggle: Any) -> Any:
        return _known(lambda: kaggle.get_model_instance(self._fill(_requests().ApiGetModelInstanceRequest())))


def _licence_name(licence: str | None) -> str | None:
    return licence if licence in _LICENCES.values() else _LICENCES.get(licence or "")


def _requests() -> Any:
    from kagglesdk.models.types import model_api_service

    return model_api_service


def _known(ask: Any) -> Any:
    """The answer; None for what is not there, which Kaggle does not tell from what is forbidden."""
    from requests import HTTPError

    try:
        return ask()
    except HTTPError as error:
        if error.response is not None and error.response.status_code in (403, 404):
            return None
        raise


@contextmanager
def _client(address: str, token: str | None) -> Iterator[Any]:
    """Kaggle's API of models, with this token instead of the saved one; failures come out as DownloadError."""
    with redirect_stdout(sys.stderr):  # where it writes is decided when it is imported
        from kagglehub import clients, config
    logger = logging.getLogger("kagglehub")
    level, credentials = logger.level, config._kaggle_credentials
    logger.setLevel(logging.ERROR)  # each file would be announced on standard output, which is for results
    try:
        with redirect_stdout(sys.stderr):
            if token is not None:
                config.set_kaggle_api_token(token)
            with clients.build_kaggle_client() as client:
                yield client.models.model_api_client
    except ModelhubError:
        raise
    except Exception as error:
        raise failed(error, address, "Kaggle", _LOGIN, token) from error
    finally:
        logger.setLevel(level)
        config._kaggle_credentials = credentials
