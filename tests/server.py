"""A small real web server on 127.0.0.1 that knows ranges and can break off in the middle."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What is served and how it misbehaves.

    files: by path. breaks: how many bytes of the next answers are sent before the connection closes, one entry an
    answer. failures: statuses of the next answers. ranges: whether Range is understood. asked: (path, Range) of each
    request so far.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    ranges: bool = True
    tag: str = '"first"'
    redirect: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    introduced: list[str | None] = field(default_factory=list)


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Site]:
    site = Site(files=dict(files))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            site.introduced.append(self.headers.get("Authorization"))
            if site.failures:
                self.send_error(site.failures.pop(0))
                return
            content = site.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            if site.redirect is not None and not self.path.startswith("/cdn"):
                self.send_response(302)
                self.send_header("Location", f"{site.redirect}/cdn{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = 0
            same = self.headers.get("If-Range") in (None, site.tag)
            if site.ranges and same and wanted and (found := re.fullmatch(r"bytes=(\d+)-", wanted)):
                start = int(found[1])
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", site.tag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            rest = content[start:]
            self.wfile.write(rest[: site.breaks.pop(0)] if site.breaks else rest)

        def log_message(self, *args: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
