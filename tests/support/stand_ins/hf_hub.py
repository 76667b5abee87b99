"""A stand-in for the Hugging Face Hub on 127.0.0.1, as far as its real client needs it for downloads and uploads.

Point the client at it, before it is imported, with HF_ENDPOINT=<url> HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_TELEMETRY=1.
Any token may write, but for READ_ONLY.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from stand_ins import faults
from stand_ins.faults import Fault

ACCEPTED = "hf_accepted"  # the token of an account that has accepted every licence
READ_ONLY = "hf_read_only"
LFS_BYTES = 1024  # the real Hub: 10 MB, or what .gitattributes names


@dataclass
class Repo:
    """revisions: branch or commit -> {path: bytes}; a branch also answers to the commit `commit_of` gives it."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False
    past: list[dict[str, bytes]] = field(default_factory=list)  # what branches held before

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        named = [*self.revisions.items(), *((commit_of(files), files) for files in self.past)]
        for branch, files in named:
            if revision in (branch, commit_of(files)):
                return commit_of(files), files
        return None


@dataclass
class Hub:
    """objects: large files by sha256, in a commit or not; received: their bytes as they came in, cut ones too."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "METHOD /path"
    faults: list[Fault] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    received: int = 0
    close: Callable[[], None] = lambda: None

    def asked(self, method: str, path: str) -> int:
        """How many requests there were of this method whose path holds `path`."""
        return sum(request.startswith(f"{method} ") and path in request for request in self.requests)


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (size >= LFS_BYTES or path.endswith(".safetensors"))


class _Handler(faults.Handler):
    hub: Hub

    def handle_any(self):
        self.path_only = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {self.path_only}")
        if self.command == "PUT":
            return self.receive()
        sent = self.body()
        if self.command == "POST" and self.pending("status", "cut"):
            return self.send(200)  # which applies the fault; nothing else happens
        for methods, pattern, answer in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, self.path_only)):
                return answer(self, *match.groups(), *([sent] if "POST" in methods else []))
        self.error(404, "EntryNotFound", f"no route {self.command} {self.path_only}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def pending(self, *kinds):
        """The next fault of these kinds for this request."""
        now = (f for f in self.faults if f.times and f.method == self.command and re.search(f.path, self.path))
        return next((fault for fault in now if fault.kind in kinds), None)

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def error(self, status, code, message, **headers):
        named = {"X-Error-Code": code, "X-Error-Message": message, **headers}
        self.send(status, message.encode(), "text/plain", named)

    def may_write(self):
        if not self.token():
            return self.error(401, "Unauthorized", "Invalid username or password.")
        if self.token() == READ_ONLY:
            return self.error(403, "Forbidden", "You don't have the rights to create or change a model here")
        return True

    # Reading

    def revision(self, name, revision):
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.token()):
            return self.error(401, "RepoNotFound", "Repository not found")
        found = repo.find(revision)
        return found or self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def info(self, name, revision=None):
        # As on the real Hub, metadata of a gated repository is open to all; only its files are not.
        if found := self.revision(name, revision or "main"):
            commit, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            about = {"id": name, "modelId": name, "sha": commit, "tags": [], "siblings": siblings}
            self.send(200, about | {"private": self.hub.repos[name].private})

    def tree(self, name, revision):
        if found := self.revision(name, revision):
            self.send(200, [_entry(path, content) for path, content in sorted(found[1].items())])

    def file(self, name, revision, path):
        if (found := self.revision(name, revision)) is None:
            return
        commit, files = found
        if self.hub.repos[name].gated and self.token() != ACCEPTED:
            status = 403 if self.token() else 401
            return self.error(status, "GatedRepo", f"Access to model {name} is restricted")
        if path not in files:
            return self.error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        content = files[path]
        if not is_lfs(path, len(content)):
            return self.send_file(content, {"X-Repo-Commit": commit, "ETag": f'"{_git_id(content)}"'})
        sha256 = hashlib.sha256(content).hexdigest()
        self.hub.objects[sha256] = content
        # The client follows redirects to the same host by itself: the stand-in for the CDN needs another name.
        location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/objects/{sha256}"
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": len(content), "X-Repo-Commit": commit}
        self.send(302, b"", "text/plain", {"Location": location, **linked})

    def object(self, sha256):
        self.send_file(self.hub.objects[sha256], {"ETag": f'"{sha256}"'})

    # Writing

    def create(self, sent):
        asked = json.loads(sent)
        if not self.may_write():
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        about = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return self.send(409, {"error": "You already created this model repo", **about})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo({"main": {".gitattributes": b""}}, private=private)
        self.send(200, about)

    def branch(self, name, branch, sent):
        if not self.may_write() or (start := self.revision(name, "main")) is None:
            return
        revisions = self.hub.repos[name].revisions
        if branch in revisions:
            return self.send(409, {"error": f"Reference already exists: {branch}"})
        revisions[branch] = start[1]
        self.send(200, {})

    def preupload(self, name, revision, sent):
        if not self.may_write() or (found := self.revision(name, revision)) is None:
            return
        modes = []
        for file in json.loads(sent)["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            there = {"oid": _digest(path, found[1][path])} if path in found[1] else {}
            modes.append({"path": path, "shouldIgnore": False, "uploadMode": mode, **there})
        self.send(200, {"files": modes})

    def batch(self, name, sent):
        if not self.may_write():
            return
        objects = []
        for wanted in json.loads(sent)["objects"]:
            links = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
            links["verify"] = {"href": f"{self.hub.url}/verify"}
            known = wanted["oid"] in self.hub.objects
            objects.append({**wanted, "authenticated": True, **({} if known else {"actions": links})})
        self.send(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def receive(self):
        if cut := self.pending("cut"):
            cut.times -= 1
            self.hub.received += len(self.rfile.read(cut.after))
            self.close_connection = True
            return self.connection.shutdown(2)
        content = self.body()
        self.hub.received += len(content)
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.path_only.endswith(sha256):
            return self.error(400, "BadRequest", "the bytes are not those of this checksum")
        if not self.pending("status"):
            self.hub.objects[sha256] = content
        self.send(200, {})

    def commit(self, name, revision, sent):
        if not self.may_write() or (found := self.revision(name, revision)) is None:
            return
        commit, files = found
        after = dict(files)
        for line in sent.splitlines():
            item = json.loads(line)
            value = item["value"]
            if value.get("parentCommit", commit) != commit:
                return self.error(
                    412, "PreconditionFailed", "A commit has happened since. Please refresh and try again"
                )
            if item["key"] == "file":
                after[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                after[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del after[value["path"]]
        repo = self.hub.repos[name]
        repo.past.append(files)
        repo.revisions[revision] = after
        oid = commit_of(after)
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})


ROUTES = [
    (("GET", "HEAD"), r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", _Handler.info),
    (("GET", "HEAD"), r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", _Handler.tree),
    (("GET", "HEAD"), r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.file),
    (("GET", "HEAD"), r"/objects/([0-9a-f]{64})", _Handler.object),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", lambda self, sent: self.send(200, {"warnings": [], "errors": []})),
    (("POST",), r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", _Handler.branch),
    (("POST",), r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", _Handler.preupload),
    (("POST",), r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (("POST",), r"/verify", lambda self, sent: self.send(200, {})),
    (("POST",), r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", _Handler.commit),
]


def _git_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _digest(path, content):
    return hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else _git_id(content)


def _entry(path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_id(content)}
    if is_lfs(path, len(content)):
        lfs = {"oid": _digest(path, content), "size": len(content), "pointerSize": 134}
        entry = entry | {"lfs": lfs, "oid": _git_id(json.dumps(lfs).encode())}
    return entry


def serve() -> Hub:
    """Start it in a thread; hub.close() ends it."""
    hub = Hub(url="")
    shared = {"hub": hub, "faults": hub.faults, "requests": hub.requests}
    hub.url, server = faults.serve(type("Handler", (_Handler,), shared))

    def close():
        server.shutdown()
        server.server_close()

    hub.close = close
    return hub
