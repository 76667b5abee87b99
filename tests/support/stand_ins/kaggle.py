"""A stand-in for Kaggle on 127.0.0.1, as far as kagglehub's model_download and model_upload need it.

kagglehub has no setting for the address: `redirect(url)` makes it this one, in the process that calls it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from stand_ins.faults import Fault, Handler
from stand_ins.faults import serve as serve_handler

OPEN_CALLS = {"GetModelInstance", "ListModelInstanceVersionFiles", "DownloadModelInstanceVersion"}
PAGE = 3  # files in one answer of the listing, so that small models have several pages


@dataclass
class Blob:
    """A file that is being uploaded, or was."""

    name: str
    size: int
    content: bytes = b""


@dataclass
class Model:
    """variations: (framework, variation) -> versions, the oldest first, each {path: bytes}. gated: only with a token."""

    variations: dict[tuple[str, str], list[dict[str, bytes]]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    licence: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Kaggle:
    """models: "owner/model" -> Model. requests: "METHOD path" with the range or the file asked for. stored: bytes."""

    url: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    blobs: dict[str, Blob] = field(default_factory=dict)
    uploaded_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    close: Callable[[], None] = lambda: None


class _Handler(Handler):
    kaggle: Kaggle

    def do_POST(self):
        query = json.loads(self.body() or b"{}")
        call = self.path.rpartition("/")[2]
        self.requests.append(f"POST {call}" + (f" {query['path']}" if query.get("path") else ""))
        with self.kaggle.lock:
            answer = self.answer(call, query)
        self.send(*answer)

    def answer(self, call: str, query: dict) -> tuple:
        name = f"{query.get('ownerSlug')}/{query.get('modelSlug') or query.get('slug')}"
        model = self.kaggle.models.get(name)
        known = bool(self.headers.get("Authorization"))
        if not known and call not in OPEN_CALLS:
            return _error(401, "Unauthenticated")
        if call == "StartBlobUpload":
            token = f"token{len(self.kaggle.blobs)}"
            self.kaggle.blobs[token] = Blob(query["name"], int(query["contentLength"]))
            return 200, {"token": token, "createUrl": f"{self.kaggle.url}/upload/{token}"}
        if call == "CreateModel":
            self.kaggle.models[name] = Model(private=query.get("isPrivate", False))
            return 200, {"id": 1, "ref": name, "url": self.kaggle.url}
        if model is None:
            return _error(404, "Not found")
        if (model.gated or model.private) and not known:
            return _error(403, "Permission denied")
        if call == "GetModel":
            return 200, {"id": 1, "ref": name, "slug": name.partition("/")[2], "isPrivate": model.private}
        body = query.get("body") or {}
        framework = _plain(query.get("framework") or body.get("framework"))
        versions = model.variations.get((framework, query.get("instanceSlug") or body.get("instanceSlug")), [])
        if call == "CreateModelInstance":
            if versions:  # 200 with the error in the body: the client then calls CreateModelInstanceVersion
                return 200, {"error": "exists", "errorCode": 409}
            model.variations[framework, body["instanceSlug"]] = [self.files_of(body)]
            model.licence = body.get("licenseName")
            return 200, {"id": 2, "ref": name, "url": self.kaggle.url}
        if not versions:
            return _error(404, "Not found")
        if call == "CreateModelInstanceVersion":
            versions.append(self.files_of(body))
            model.notes.append(body.get("versionNotes", ""))
            return 200, {"id": 3, "ref": name, "url": self.kaggle.url}
        if call == "GetModelInstance":
            return 200, {"id": 2, "slug": query["instanceSlug"], "versionNumber": len(versions)}
        if not 1 <= int(query["versionNumber"]) <= len(versions):
            return _error(404, "Not found")
        files = versions[int(query["versionNumber"]) - 1]
        if call == "ListModelInstanceVersionFiles":
            start = int(query.get("pageToken") or 0)
            page = list(files.items())[start : start + PAGE]
            more = str(start + PAGE) if start + PAGE < len(files) else ""
            return 200, {"files": [{"name": path, "size": len(b)} for path, b in page], "nextPageToken": more}
        if call == "DownloadModelInstanceVersion":
            if query.get("path") not in files:
                return _error(404, "No such file")
            where = f"/storage/{name}/{framework}/{query['instanceSlug']}/{query['versionNumber']}/{query['path']}"
            location = f"{self.kaggle.url}{where}?X-Goog-Signature=secret"
            return 302, b"", "text/plain", {"Location": location}
        return _error(501, call)

    def do_GET(self):
        """A file in the storage; whoever has its address can read it."""
        self.requests.append(" ".join(filter(None, ["GET", self.path.partition("?")[0], self.headers.get("Range")])))
        path = self.path.partition("?")[0]
        match = re.fullmatch(r"/storage/([^/]+/[^/]+)/([^/]+)/([^/]+)/(\d+)/(.+)", path)
        content = self.kaggle.models[match[1]].variations[match[2], match[3]][int(match[4]) - 1][match[5]]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        self.send_file(content, {"x-goog-hash": f"md5={digest}"})

    def do_PUT(self):
        """A part of a file, or the question how much of it has arrived (Google's resumable uploads)."""
        blob = self.kaggle.blobs[self.path.rpartition("/")[2]]
        asked = self.headers.get("Content-Range", "")
        self.requests.append(f"PUT {blob.name} {asked}".strip())
        if not asked.startswith("bytes */"):
            first = re.match(r"bytes (\d+)-", asked)
            start, length = int(first[1]) if first else 0, int(self.headers.get("Content-Length") or 0)
            cut = next((f for f in self.faults if f.kind == "cut" and f.method == "PUT" and f.times), None)
            content = self.rfile.read(min(length, cut.after) if cut else length)
            blob.content = blob.content[:start] + content
            self.kaggle.uploaded_bytes += len(content)
            if cut:
                cut.times -= 1
                self.close_connection = True
                self.connection.shutdown(2)
                return
        if len(blob.content) == blob.size:
            self.send(200)
        else:
            self.send(308, headers={"Range": f"bytes=0-{len(blob.content) - 1}"} if blob.content else {})

    def files_of(self, directory: dict, prefix: str = "") -> dict[str, bytes]:
        blobs = [self.kaggle.blobs[file["token"]] for file in directory.get("files") or []]
        files = {prefix + blob.name: blob.content for blob in blobs}
        for inner in directory.get("directories") or []:
            files |= self.files_of(inner, f"{prefix}{inner['name']}/")
        return files


def _error(status: int, message: str) -> tuple:
    return status, {"code": status, "message": message}


def _plain(framework: str | None) -> str:
    """keras, of modelFrameworkKeras, MODEL_FRAMEWORK_KERAS and keras."""
    return re.sub("modelframework", "", (framework or "").replace("_", "").lower())


def redirect(url: str) -> None:
    """Make the kagglehub of this process talk to `url`."""
    import kagglehub.clients
    from kagglesdk.kaggle_env import KaggleEnv, _env_to_endpoint

    _env_to_endpoint[KaggleEnv.PROD] = url
    kagglehub.clients.get_user_agent = lambda: "kagglehub"  # reads all modules: 1 s a call


def serve() -> Kaggle:
    """Start it in a thread; kaggle.close() ends it."""
    kaggle = Kaggle()
    state = {"kaggle": kaggle, "faults": kaggle.faults, "requests": kaggle.requests}
    kaggle.url, server = serve_handler(type("Handler", (_Handler,), state))

    def close():
        server.shutdown()
        server.server_close()

    kaggle.close = close
    return kaggle
