"""Repositories on the Hugging Face Hub, through huggingface_hub."""

import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modelhub.errors import InputError
from modelhub.hub.publish.base import File, Shipment, There, check_privacy, failed

_LOGIN = "hf auth login (or give token=...)"
_RESUMES = " (files that arrived whole are not sent again)"


@dataclass(frozen=True)
class HubTarget:
    """A repository, and the branch to commit to (None: main)."""

    repo: str  # "owner/name"
    branch: str | None = None
    whole: ClassVar[bool] = False

    @property
    def address(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.branch}" if self.branch else "")

    @property
    def title(self) -> str:
        return self.repo.partition("/")[2]

    @classmethod
    def parse(cls, address: str, place: str, revision: str | None) -> "HubTarget":
        """place: owner/name. Raises InputError."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place, re.ASCII) or "--" in place or ".." in place:
            raise InputError(f"{address!r} is no repository on the Hugging Face Hub; write hf://owner/name")
        if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
            raise InputError(f"{revision} is a commit, and those never change; give the name of a branch, or none")
        return cls(place, revision)

    def look(self, folder: Path, token: str | None) -> There:
        """The files by sha256, small ones by git's sha1; of main where the branch is missing."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(token=token)
        try:
            info = api.model_info(self.repo)
            version = None if self.branch else info.sha
            if self.branch:
                with suppress(RevisionNotFoundError):
                    version = api.model_info(self.repo, revision=self.branch).sha
            base = version or info.sha
            entries = list(api.list_repo_tree(self.repo, recursive=True, revision=base))
        except RepositoryNotFoundError:
            return There()
        except Exception as error:  # every HTTP library has its own classes
            raise self._failed(error, token) from error
        files = {x.path: x.lfs.sha256 if x.lfs else x.blob_id for x in entries if isinstance(x, RepoFile)}
        return There(version, files, bool(info.private), base=base)

    def read(self, name: str, there: There, token: str | None) -> bytes:
        """A file that is there. Raises DownloadError."""
        from huggingface_hub import hf_hub_download

        try:
            with tempfile.TemporaryDirectory() as work:
                path = hf_hub_download(self.repo, name, revision=there.base, token=token, local_dir=work)
                return Path(path).read_bytes()
        except Exception as error:
            raise self._failed(error, token) from error

    def check(self, files: Sequence[File], there: There, private: bool, licence: str | None) -> list[str]:
        if there.base is None:
            return [f"hf://{self.repo} is a new {'private' if private else 'public'} repository"]
        return check_privacy(f"hf://{self.repo}", there, private, f"{self._page}/settings")

    def send(self, shipment: Shipment, there: There) -> str:
        """One commit. Large files go first, each for itself, and stay with the Hub if a later one fails."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi(token=shipment.token)
        sent = shipment.states("new", "changed")
        try:
            if there.base is None:
                api.create_repo(self.repo, private=shipment.private, exist_ok=True)
            if self.branch and there.version is None:
                api.create_branch(self.repo, branch=self.branch, exist_ok=True)
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(file.name, file.content) for file in shipment.files if file.name in sent
            ]
            operations += [CommitOperationDelete(name) for name in shipment.states("removed")]
            if not operations and there.base is not None:  # a new branch that is equal to main
                return there.base
            message = shipment.message or "Upload with modelhub"
            # With the commit that was compared: of two who publish at once, one is told.
            return api.create_commit(
                self.repo, operations, commit_message=message, revision=self.branch, parent_commit=there.base
            ).oid
        except Exception as error:
            raise self._failed(error, shipment.token) from error

    def published(self, version: str) -> tuple[str, str | None]:
        return f"hf://{self.repo}@{version}", self._page + (f"/tree/{self.branch}" if self.branch else "")

    @property
    def _page(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo}"

    def _failed(self, error: Exception, token: str | None) -> Exception:
        return failed(error, self.address, "the Hugging Face Hub", _LOGIN, token, _RESUMES)
