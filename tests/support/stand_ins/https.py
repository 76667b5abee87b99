"""A web server with static files on 127.0.0.1, over TLS with a certificate of its own authority."""

import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trustme
from stand_ins.faults import Fault, Handler
from stand_ins.faults import serve as serve_handler


@dataclass
class Site:
    """files: path -> bytes, or the address that a request for it is sent on to. authority: a .pem file, or None."""

    url: str = ""
    authority: Path | None = None
    files: dict[str, bytes | str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "GET /path", and the range that is asked for
    faults: list[Fault] = field(default_factory=list)
    etags: bool = True
    close: Callable[[], None] = lambda: None


class _Handler(Handler):
    site: Site

    def do_GET(self):
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        self.requests.append(" ".join(filter(None, ["GET", self.path, asked])))
        content = self.site.files.get(self.path.partition("?")[0])
        if content is None:
            self.send(404)
        elif isinstance(content, str):
            self.send(302, headers={"Location": content})
        else:
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            if condition not in (None, etag):
                del self.headers["Range"]
            self.send_file(content, {"ETag": etag} if self.site.etags else {})


def serve(folder: Path | None) -> Site:
    """Start it in a thread; site.close() ends it. folder: where its authority's certificate is put; None: plain http."""
    site = Site()
    state = {"site": site, "faults": site.faults, "requests": site.requests}
    site.url, server = serve_handler(type("Handler", (_Handler,), state))
    server.handle_error = lambda request, address: None  # a client that goes away, or mistrusts the certificate
    if folder is not None:
        authority = trustme.CA()
        site.authority = folder / "authority.pem"
        authority.cert_pem.write_to_path(site.authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        site.url = site.url.replace("http:", "https:")

    def close():
        server.shutdown()
        server.server_close()

    site.close = close
    return site
