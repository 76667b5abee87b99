"""A stand-in for the Hugging Face Hub on 127.0.0.1, as far as its real client needs it for downloads.

Point the client at it, before it is imported, with HF_ENDPOINT=<url> HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_TELEMETRY=1.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ACCEPTED = "hf_accepted"  # the token of an account that has accepted every licence


@dataclass
class Repo:
    """revisions: branch or commit -> {path: bytes}; a branch also answers to the commit `commit_of` gives it."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for branch, files in self.revisions.items():
            if revision in (branch, commit_of(files)):
                return commit_of(files), files
        return None


@dataclass
class Hub:
    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    close: object = None


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self.metadata(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*match.groups())
        else:
            self.error(404, "EntryNotFound", f"no route {path}")

    do_HEAD = do_GET

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def revision(self, name, revision):
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.token()):
            return self.error(401, "RepoNotFound", "Repository not found")
        found = repo.find(revision)
        return found or self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def metadata(self, name, verb, revision):
        # As on the real Hub, metadata of a gated repository is open to all; only its files are not.
        if (found := self.revision(name, revision)) is None:
            return
        commit, files = found
        if verb == "tree":
            entries = [{"type": "file", "path": p, "size": len(b), "oid": _git_id(b)} for p, b in sorted(files.items())]
            return self.json(entries)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.json({"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def file(self, name, revision, path):
        if (found := self.revision(name, revision)) is None:
            return
        commit, files = found
        if self.hub.repos[name].gated and self.token() != ACCEPTED:
            status = 403 if self.token() else 401
            return self.error(status, "GatedRepo", f"Access to model {name} is restricted")
        if path not in files:
            return self.error(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        data = files[path]
        self.send(200, data, "application/octet-stream", X_Repo_Commit=commit, ETag=f'"{_git_id(data)}"')

    def json(self, value):
        self.send(200, json.dumps(value).encode(), "application/json")

    def error(self, status, code, message, **headers):
        self.send(status, message.encode(), "text/plain", X_Error_Code=code, X_Error_Message=message, **headers)

    def send(self, status, body, kind, **headers):
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _git_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def serve() -> Hub:
    """Start it in a thread; hub.close() ends it."""
    hub = Hub(url="")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"

    def close():
        server.shutdown()
        server.server_close()

    hub.close = close
    return hub
