"""What the stand-in servers share: answers, a log of the requests, and faults on request."""

import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """Something that goes wrong with the next `times` requests of this method whose path `path` is found in.

    kind: "status" answers with `status` (and `headers`, such as Retry-After) instead; "cut" closes the connection after
    `after` bytes of the body; "slow" waits `seconds` before the answer; "stall" waits them after `after` bytes of the
    body; "corrupt" changes the body's first byte.
    """

    path: str  # a regular expression
    kind: str
    method: str = "GET"
    status: int = 500
    headers: dict = field(default_factory=dict)
    after: int = 0
    seconds: float = 0.0
    times: int = 1


class Handler(BaseHTTPRequestHandler):
    """Subclasses answer with `send`. requests: "METHOD /path?query", in order of arrival; sent: bytes of all bodies."""

    protocol_version = "HTTP/1.1"
    faults: list[Fault]
    requests: list[str]

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        """The request's body, plain or chunked."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(
        self, status: int, body: object = b"", content_type: str = "application/json", headers: dict | None = None
    ):
        """Answer with bytes, or with JSON; a HEAD request gets the headers alone."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        fault = self._fault()
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault and fault.kind == "status":
            status, raw, headers, content_type = fault.status, b'{"error": "fault"}', fault.headers, "application/json"
        if fault and fault.kind == "corrupt" and raw:
            raw = bytes([raw[0] ^ 0xFF]) + raw[1:]
        self.send_response(status)
        merged = {"Content-Type": content_type, "Content-Length": str(len(raw))} | {
            k: str(v) for k, v in (headers or {}).items()
        }
        for name, value in merged.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind == "cut":
            self.wfile.write(raw[: fault.after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        if fault and fault.kind == "stall":
            self.wfile.write(raw[: fault.after])
            time.sleep(fault.seconds)
            raw = raw[fault.after :]
        self.wfile.write(raw)

    def send_file(self, content: bytes, headers: dict | None = None):
        """A file's bytes, or the range of them that the request asks for."""
        headers = {"Accept-Ranges": "bytes"} | (headers or {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.send(200, content, "application/octet-stream", headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if first >= len(content):
            return self.send(416, b"", "text/plain", {"Content-Range": f"bytes */{len(content)}"})
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self.send(206, content[first : last + 1], "application/octet-stream", headers | span)

    def _fault(self) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, self.path):
                fault.times -= 1
                return fault
        return None


def serve(handler: type[Handler]) -> tuple[str, ThreadingHTTPServer]:
    """Its address on a free port, and the server; end it with shutdown() and server_close()."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # shutdown waits for a turn
    return f"http://127.0.0.1:{server.server_address[1]}", server
