"""A real HTTP server over a folder that fails as told, and counts what it was asked for and what it sent."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request; nothing by default."""

    status: int | None = None
    """Answer with this status and no data."""
    cut: int | None = None
    """Close the connection after this many bytes of the data."""
    stall: float = 0
    """Seconds of silence before the data."""
    drip: float = 0
    """Seconds between blocks of 16 KiB."""
    corrupt: bool = False
    """Flip one bit in the middle of the data."""
    ignore_range: bool = False
    """Send the whole file with status 200, whatever range is asked for."""
    short: int = 0
    """Leave out that many bytes at the end, and say so in Content-Length."""


@dataclass(frozen=True)
class Request:
    """One request for a file, in the order in which they came: numbered per file from 0."""

    name: str
    number: int
    start: int
    end: int
    """Of the range asked for; the size of the file if none was."""


@dataclass
class Traffic:
    """What one file has cost."""

    requests: int = 0
    sent: int = 0
    """Bytes of data, of which a cut connection may have swallowed some."""
    ranges: list[tuple[int, int]] = field(default_factory=list)


class FaultyServer(ThreadingHTTPServer):
    """Serves `folder` at `url`; `fault` says what goes wrong with each request."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.traffic: dict[str, Traffic] = {}
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    def handle_error(self, request, client_address) -> None:
        """A client that was killed is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if path.is_dir():
            return self._send(200, self._listing(path), "text/html")
        if not path.is_file():
            return self._send(404, b"")
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = 0, len(data)
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        with self.server.lock:
            self.server.headers.append(dict(self.headers))
            traffic = self.server.traffic.setdefault(path.name, Traffic())
            request = Request(path.name, traffic.requests, start, end)
            traffic.requests += 1
            traffic.ranges.append((start, end))
            fault = self.server.fault(request) or Fault()
        time.sleep(fault.stall)
        if fault.status is not None:
            return self._send(fault.status, b"")
        if fault.ignore_range:
            asked = None
            start, end = 0, len(data)
        elif asked and start >= len(data):
            return self._send(416, b"")
        body = data[start : end - fault.short]
        if fault.corrupt:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self._head(206 if asked else 200, len(body), f"bytes {start}-{end - 1}/{len(data)}" if asked else None)
        if fault.cut is not None:
            body = body[: fault.cut]
        for position in range(0, len(body), 16 << 10):
            block = body[position : position + (16 << 10)]
            self.wfile.write(block)
            with self.server.lock:
                traffic.sent += len(block)
            time.sleep(fault.drip)
        if fault.cut is not None:
            self.close_connection = True
        return None

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if path.is_file():
            self._head(200, path.stat().st_size, None)
        else:
            self._send(404, b"")

    def _listing(self, folder: Path) -> bytes:
        links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in sorted(folder.iterdir()))
        return f"<html><body><pre>{links}</pre></body></html>".encode()

    def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self._head(status, len(body), None, kind)
        self.wfile.write(body)

    def _head(self, status: int, length: int, content_range: str | None, kind: str = "application/x-tar") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", kind)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    """Run a server for as long as the block."""
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
