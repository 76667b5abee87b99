"""Repositories on the Hugging Face Hub, through huggingface_hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from modelhub.errors import DownloadError, PresetNotFound
from modelhub.hub.sources.base import TEXT_FILES, WEIGHT_FILES, Options, Unreachable, cache_root

_HUB_ADDRESS = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)


@dataclass(frozen=True)
class HubSource:
    """A repository on the Hugging Face Hub; revision is a branch, a tag or a commit (None: the main branch)."""

    repo: str  # "owner/name"
    revision: str | None = None
    verified: bool = False

    @classmethod
    def parse(cls, address: str, verified: bool = False) -> "HubSource":
        """From hf://owner/name or hf://owner/name@revision. Raises PresetNotFound for anything else."""
        match = _HUB_ADDRESS.fullmatch(address)
        if match is None or "--" in match["repo"] or ".." in match["repo"]:  # the last two by the Hub's rules
            raise PresetNotFound(f"{address!r} is no address on the Hub; write hf://owner/name[@revision]")
        return cls(match["repo"], match["revision"], verified)

    def address(self, path: Path) -> str:
        """Where the files at `path` came from; the folder of a snapshot has the commit's name."""
        return f"hf://{self.repo}@{path.name}"

    def find(self, options: Options) -> Path | None:
        """The complete snapshot in the cache, or None."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self._snapshot(options, local_files_only=True)
        except LocalEntryNotFoundError:
            return None

    def fetch(self, options: Options) -> Path:
        """Download what is missing or out of date and return the snapshot's folder.

        Without a network an earlier snapshot serves. Raises PresetNotFound (no such repository or revision),
        DownloadError (licence not accepted, disk full) and Unreachable.
        """
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{self.repo}"
        try:
            folder = self._snapshot(options)
        except errors.GatedRepoError:
            raise DownloadError(
                f"hf://{self.repo} is gated: its licence must be accepted once. Open {page}, accept it, then log in on "
                "this machine with the same account: hf auth login (or give token=...)"
            ) from None
        except errors.RepositoryNotFoundError:
            raise PresetNotFound(
                f"the Hub knows no repository {self.repo!r}, or it is private and your token does not open it. "
                f"Check the name at {page}; for a private one log in: hf auth login (or give token=...)"
            ) from None
        except errors.RevisionNotFoundError:
            wanted = options.revision or self.revision
            raise PresetNotFound(f"hf://{self.repo} has no branch, tag or commit {wanted!r}; see {page}") from None
        except Exception as error:  # whatever else its client raises: every HTTP library has its own classes
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            raise Unreachable(
                f"hf://{self.repo} could not be downloaded and is not complete in the cache {self._cache(options)} "
                f"({reason}). Check the network and try again"
            ) from error
        if not (folder / "config.json").is_file():
            raise PresetNotFound(f"hf://{self.repo} has no config.json: it is no model folder; see {page}/tree/main")
        return folder

    def _snapshot(self, options: Options, local_files_only: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.repo,
            revision=options.revision or self.revision,
            token=options.token,
            cache_dir=self._cache(options),
            allow_patterns=[*TEXT_FILES, *(WEIGHT_FILES if options.weights else ())],
            ignore_patterns=["*/*"],  # patterns match across folders; a preset is the top one
            local_files_only=local_files_only,
        )
        return Path(folder)

    def _cache(self, options: Options) -> Path:
        # Without a choice of the user's it is the Hub's own cache: what transformers has fetched is not fetched again.
        if options.cache_dir or os.environ.get("MODELHUB_CACHE"):
            return cache_root(options.cache_dir) / "hf"
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)
