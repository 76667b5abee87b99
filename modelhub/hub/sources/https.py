"""Files on a web server: a .gguf file, or an archive of a model folder, known by its sha256."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import unquote, urlsplit

from modelhub.errors import CheckpointError, DownloadError, PresetNotFound
from modelhub.hub.sources.base import Options, Unreachable, cache_root, check_resolves, progress, sha256_of
from modelhub.hub.sources.entry import (
    RETRY_STATUS,
    check_room,
    fill_entry,
    find_entry,
    read_record,
    retry_after,
    with_retries,
)

if TYPE_CHECKING:
    import httpx2

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BLOCK = 1 << 20
_REDIRECTS = 10


@dataclass(frozen=True)
class HttpsSource:
    """One file on a web server. It is trusted for its sha256, not for where it comes from."""

    url: str
    sha256: str
    verified: bool = False
    revision: ClassVar[None] = None

    @classmethod
    def parse(cls, address: str, verified: bool = False) -> "HttpsSource":
        """From https://host/path/file#sha256=<hex>, the file a .gguf or an archive. Raises PresetNotFound."""
        url, _, fragment = address.partition("#")
        shown = _shown(url)
        try:
            parts = urlsplit(url)
            host, user = parts.hostname, parts.username
        except ValueError as error:
            raise PresetNotFound(f"{shown!r} is no address ({error})") from None
        name = parts.path.lower()
        if user is not None:
            raise PresetNotFound(
                f"{shown}: addresses are written into logs and records; leave the user and password out"
            )
        if not host or not _may_load(url, local=True):
            raise PresetNotFound(f"{shown}: files are fetched over https only; write https://host/path/model.gguf")
        if name.endswith(_PICKLES):
            raise PresetNotFound(
                f"{shown} is a pickle, and opening a pickle can run any code that its author put in it; it is not "
                "fetched. Take a .gguf file, or an archive of a folder with safetensors"
            )
        if not name.endswith((".gguf", *_ARCHIVES)):
            raise PresetNotFound(f"{shown} is of no known kind: known are .gguf, {', '.join(_ARCHIVES)}")
        if not fragment:
            raise PresetNotFound(
                f"{shown} says no checksum, and nothing else tells that the right file arrives. Add the one that its "
                f"publisher gives, or `sha256sum` prints: {shown}#sha256=<64 hex digits>"
            )
        match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
        if match is None:
            raise PresetNotFound(f"{shown}#{fragment[:80]}: expected #sha256= and 64 hex digits after the address")
        return cls(url, match[1], verified)

    def takes(self, revision: str) -> bool:
        return False

    def address(self, path: Path) -> str:
        """The file's address with its sha256, without a query: that may be a signature which opens it."""
        return f"{_shown(self.url)}#sha256={self.sha256}"

    def find(self, options: Options) -> Path | None:
        """The file, or the folder that was in the archive, in the cache; None if it is not there."""
        folder = find_entry(self._entry(options), options.weights)
        return folder and self._result(folder)

    def fetch(self, options: Options) -> Path:
        """Download the file, check its sha256 and unpack it; a transfer that was cut goes on where it stopped.

        Raises PresetNotFound (no such file), DownloadError (refused, wrong bytes, a hostile archive, disk full) and
        Unreachable.
        """
        entry = self._entry(options)
        return self._result(fill_entry(entry, self.address(entry), True, self._fill))

    @property
    def _name(self) -> str:
        name = unquote(urlsplit(self.url).path.rpartition("/")[2])
        return re.sub(r"[^\w.-]", "_", name.lstrip("."))

    @property
    def _is_gguf(self) -> bool:
        return self._name.lower().endswith(".gguf")

    def _entry(self, options: Options) -> Path:
        return cache_root(options.cache_dir) / "https" / self.sha256

    def _result(self, folder: Path) -> Path:
        if not self._is_gguf:
            return folder
        record = read_record(folder)  # the file may have come from another address, under another name
        return folder / next(iter(record["files"])) if record else folder

    def _fill(self, work: Path) -> dict[str, str]:
        from modelhub.hub.sources.archives import Refused, extract

        files = work / "files"
        file = files / self._name if self._is_gguf else work / "archive"
        self._download(file, work)
        if (found := sha256_of(file)) != self.sha256:
            size = file.stat().st_size
            file.unlink()
            raise DownloadError(
                f"{_shown(self.url)} arrived with the wrong bytes: sha256 {found} ({size:,} bytes), expected "
                f"{self.sha256}; nothing was kept. Check the sum; if it is right, the server has another file there now"
            )
        if self._is_gguf:
            return {self._name: found}
        shutil.rmtree(files)
        try:
            return extract(file, self._name.lower(), work, _shown(self.url))
        except (Refused, CheckpointError, PresetNotFound):
            file.unlink()
            raise

    def _download(self, file: Path, work: Path) -> None:
        import httpx2

        check_resolves(self.url)
        with httpx2.Client(
            timeout=httpx2.Timeout(30, connect=10), headers={"Accept-Encoding": "identity", "User-Agent": "modelhub"}
        ) as client:
            try:
                with_retries(lambda: self._transfer(client, file, work), _pause_after)
            except httpx2.HTTPStatusError as error:
                raise self._refusal(error.response) from None
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                if certificate := _certificate_error(error):
                    raise DownloadError(
                        f"{_shown(self.url)}: the server's certificate is not valid ({certificate}), so it may be "
                        "another server; nothing was sent. Where an authority of your own signs it, set SSL_CERT_FILE"
                    ) from error
                raise Unreachable(
                    f"{_shown(self.url)} could not be downloaded ({error or type(error).__name__}). Check the network "
                    "and try again; what arrived is kept"
                ) from error

    def _transfer(self, client: "httpx2.Client", file: Path, work: Path) -> None:
        """One request, which goes on after the bytes that are there."""
        import httpx2

        note = work / "validator"  # what tells whether the server still has the file that the bytes are of
        have = file.stat().st_size if file.is_file() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and note.is_file():
            headers["If-Range"] = note.read_text()
        with self._open(client, headers) as response:
            total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code == 416 and total and int(total[2]) == have:
                return  # it had all arrived
            if response.status_code == 416:
                file.unlink(missing_ok=True)
                raise httpx2.RemoteProtocolError("the file on the server has changed")
            if not response.is_success:
                response.raise_for_status()
            appending = response.status_code == 206 and total is not None and total[1] == str(have)
            if response.status_code == 206 and not appending:
                raise httpx2.RemoteProtocolError("the server answers with another range than asked for")
            have = have if appending else 0
            size = have + int(response.headers.get("Content-Length") or 0)
            if not appending:
                file.unlink(missing_ok=True)
            check_room(work, size, _shown(self.url))
            etag = response.headers.get("ETag", "")
            # RFC 9110, 13.1.5: a weak one must not be used here
            note.write_text(etag if etag.startswith('"') else response.headers.get("Last-Modified", ""))
            if not note.read_text():
                note.unlink()
            with open(file, "ab") as out, progress(self._name, size) as show:
                for block in response.iter_raw(_BLOCK):
                    out.write(block)
                    show(out.tell(), 0)

    @contextmanager
    def _open(self, client: "httpx2.Client", headers: dict[str, str]) -> Iterator["httpx2.Response"]:
        """The answer, after redirects; none of them may leave https."""
        request = client.build_request("GET", self.url, headers=headers)
        for _ in range(_REDIRECTS):
            response = client.send(request, stream=True)
            try:
                if response.next_request is None:
                    yield response
                    return
                request = response.next_request
            finally:
                response.close()
            if not _may_load(str(request.url), local=_is_local(self.url)):
                raise DownloadError(
                    f"{_shown(self.url)} leads on to {_shown(str(request.url))}, and files are fetched over https only"
                )
        raise Unreachable(f"{_shown(self.url)} leads on more than {_REDIRECTS} times")

    def _refusal(self, response: "httpx2.Response") -> DownloadError | PresetNotFound:
        shown, status = _shown(self.url), response.status_code
        if status in (404, 410):
            return PresetNotFound(f"{shown}: the server has no such file ({status}); check the address")
        if status in RETRY_STATUS:
            asked = retry_after(response.headers)
            when = f"; it asks to wait {asked:.0f} s" if asked else ""
            return Unreachable(f"{shown}: the server answers {status}{when}. Try again later; what arrived is kept")
        return DownloadError(
            f"{shown}: the server refuses it ({status}). modelhub sends no credentials to web servers: take an address "
            "that opens without, or download the file yourself and give its path"
        )


def _shown(url: str) -> str:
    """Without query and password: they may be secrets."""
    return re.sub(r"//[^/@]*@", "//", re.split(r"[?#]", url)[0])


def _is_local(url: str) -> bool:
    return urlsplit(url).hostname in _LOOPBACK


def _may_load(url: str, local: bool) -> bool:
    """https, or where `local` says so http on this machine, where nobody listens in."""
    scheme = urlsplit(url).scheme
    return scheme == "https" or (scheme == "http" and local and _is_local(url))


def _pause_after(error: Exception) -> float | None:
    import httpx2

    if isinstance(error, httpx2.HTTPStatusError):
        response = error.response
        return retry_after(response.headers) if response.status_code in RETRY_STATUS else None
    return 0.0 if isinstance(error, httpx2.TransportError) and not _certificate_error(error) else None


def _certificate_error(error: BaseException | None) -> BaseException | None:
    import ssl

    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error
