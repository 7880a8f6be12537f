"""Files from anywhere that fsspec reaches (https, s3, gs, hf and more): small ones whole, shards piece by piece.

A download goes on from what an earlier one left, survives cut and stalled connections, and gives up at once on
what waiting cannot mend. Whether the bytes are the right ones is for the caller to check: see `shards.cache`.
"""

from __future__ import annotations

import difflib
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from shards.errors import UserError

Result = TypeVar("Result")

PIECE = 16 << 20
"""Most bytes asked for in one request, and so in memory. Halved after each failure: a link that breaks every few
megabytes is still got through."""

_SMALLEST_PIECE = 64 << 10
_LONGEST_DELAY = 30.0  # seconds
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters at least: C:// is a Windows path
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_jitter = random.Random()  # the global generator may have been seeded by a training that counts on its state


@dataclass(frozen=True)
class Retry:
    """How patient a download is."""

    attempts: int = 8
    """Failures in a row, with not a byte gained, after which it is given up."""
    first_delay: float = 0.5
    """Seconds before the second attempt; doubled for each further one up to 30 s, less a random part of up to half."""
    stall: float = 30.0
    """Seconds without a byte (http), after which a connection counts as dead; four times that for a whole request."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL (``scheme://…``) rather than a path."""
    return _SCHEME.match(location) is not None


def scheme_of(url: str) -> str:
    """``S3://bucket/key`` → ``s3``.

    Raises:
        UserError: if it is no URL.
    """
    match = _SCHEME.match(url)
    if match is None:
        raise UserError(f"{mask(url)}: is no URL", "A URL is scheme://…, such as https://host/imagenet")
    return match[1].lower()


def join_url(root: str, name: str) -> str:
    """The URL of a file in a remote folder; the query of an http root (an access token, say) stays at the end."""
    if scheme_of(root) not in ("http", "https"):
        return f"{root.rstrip('/')}/{name}"
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def mask(text: str) -> str:
    """The text with user names, passwords and queries of URLs in it made unreadable: they may be secrets."""
    # after a colon to the last @ before a blank: a password may hold slashes, quotes and further @
    text = re.sub(r"://(?:[^\s?#/@]*:[^\s?#]*|[^/\s@]+)@", "://***@", text)
    return re.sub(r"(://[^\s?#]*)[?#]\S+", r"\1?***", text)


def check_scheme(url: str) -> None:
    """Check that fsspec knows the scheme of a URL and that the package for it is installed; no request is made.

    Raises:
        UserError: naming the scheme meant or the package to install.
    """
    import fsspec

    scheme = scheme_of(url)
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        near = difflib.get_close_matches(scheme, ["https", "http", "s3", "gs", "hf", *fsspec.available_protocols()], 1)
        raise UserError(
            f"{mask(url)}: unknown scheme {scheme}://",
            *([f"Did you mean {near[0]}://?"] if near else []),
            "Usual ones are https://, s3://, gs:// and hf://; all that fsspec knows can be used.",
        ) from None
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        mend = f"pip install 'onehour[{extra}]'" if extra else str(error)
        raise UserError(f"{mask(url)}: {scheme}:// needs a package that is not installed", mend) from error


def read_small(url: str, limit: int = 64 << 20, *, retry: Retry | None = None) -> bytes:
    """The content of a small file.

    Args:
        url: anything that fsspec opens.
        limit: most bytes it may have.
        retry: how patient to be.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if it is larger than `limit`, or cannot be read for another reason, naming URL and mend.
    """
    source = _Source(url, retry or Retry(attempts=4))  # nothing has begun: an early answer is worth more
    failures = _Failures(url, source.retry)
    while True:
        try:
            data = source.read(0, limit + 1)
        except FileNotFoundError:
            raise
        except Exception as error:
            failures.add(error, "cannot be read")
            continue
        if len(data) > limit:
            raise UserError(f"{mask(url)}: larger than {limit:,} bytes", "That is not the file it should be.")
        return data


@dataclass(frozen=True)
class Listed:
    """A file or a folder found in a remote folder."""

    url: str
    is_folder: bool


def list_folder(url: str, *, retry: Retry | None = None) -> list[Listed]:
    """What lies directly in a remote folder; of an http server, what its page of the folder links to.

    Raises:
        UserError: if the folder is not there or cannot be listed.
    """
    source = _Source(url, retry or Retry())
    failures = _Failures(url, source.retry)
    while True:
        try:
            return source.list()
        except Exception as error:
            failures.add(error, "cannot be listed")


def size_of(url: str, *, retry: Retry | None = None) -> int:
    """The size of a file in bytes.

    Raises:
        UserError: if it is not there, or the server does not say.
    """
    source = _Source(url, retry or Retry())
    failures = _Failures(url, source.retry)
    while True:
        try:
            size = source.size()
        except Exception as error:
            failures.add(error, "cannot be reached")
            continue
        if not size:
            raise UserError(f"{mask(url)}: is empty, or the server does not say how large it is")
        return size


def download(url: str, partial: Path, size: int, *, retry: Retry | None = None) -> None:
    """Make `partial` hold the whole file, going on from the bytes it already holds.

    One piece of at most `PIECE` bytes is in memory at a time. A server that ignores ranges and sends the whole
    file whatever is asked for is put up with: then the whole file is in memory.

    Args:
        url: anything that fsspec opens with random access.
        partial: local file; made if absent. Nobody else may write it meanwhile.
        size: of the whole file, in bytes.
        retry: how patient to be.

    Raises:
        UserError: naming URL and mend: if it is not there or not permitted, at once; if it ends early or the
            connection fails, after `retry.attempts` failures in a row; if the disk is full.
    """
    source = _Source(url, retry or Retry())
    failures = _Failures(url, source.retry)
    piece = PIECE
    try:
        with partial.open("ab") as file:
            position = file.tell()
            if position > size:
                position = _rewind(file)
            while position < size:
                wanted = min(piece, size - position)
                try:
                    data = source.read(position, position + wanted)
                    if not data:
                        raise EOFError(f"ends at byte {position:,}, should have {size:,}")
                    if len(data) > wanted and len(data) != size:
                        raise EOFError(f"has {len(data):,} bytes, should have {size:,}")
                except Exception as error:
                    failures.add(error, "cannot be downloaded")
                    piece = max(piece // 2, _SMALLEST_PIECE)
                    continue
                if len(data) > wanted:
                    position = _rewind(file)
                file.write(data)
                file.flush()  # what a killed process has got is there for the next one
                position += len(data)
                failures.reset()
                piece = min(2 * piece, PIECE)
    except OSError as error:
        raise UserError(
            f"{partial}: cannot be written: {error.strerror or error}",
            f"Its shard needs {size:,} bytes there. Free the disk or choose another folder for the cache.",
        ) from error


def _rewind(file: Any) -> int:
    file.truncate(0)
    return 0


class _Source:
    """One URL opened by fsspec: each `read` is one request."""

    def __init__(self, url: str, retry: Retry) -> None:
        check_scheme(url)
        self.url = url
        self.retry = retry
        from fsspec.core import url_to_fs

        try:
            self._file_system, self._path = url_to_fs(url, **_options(scheme_of(url), retry))
        except Exception as error:
            raise _refusal(url, error, "cannot be opened") from error
        # fsspec would read ahead of each piece and throw that away
        self._reading = {"cache_type": "none"} if scheme_of(url) == "hf" else {}

    def read(self, start: int, end: int) -> bytes:
        """Bytes from `start` up to `end`, fewer at the end of the file; more from servers that ignore ranges."""
        read = self._file_system.cat_file
        return _within(4 * self.retry.stall, lambda: read(self._path, start=start, end=end, **self._reading))

    def list(self) -> list[Listed]:
        """Files and folders of a folder."""
        listing = self._file_system.ls
        found = _within(4 * self.retry.stall, lambda: listing(self._path, detail=True))
        return [
            Listed(self._file_system.unstrip_protocol(entry["name"]), entry["type"] == "directory") for entry in found
        ]

    def size(self) -> int | None:
        """Of the file, in bytes; None if the server does not say."""
        size = self._file_system.size
        return _within(4 * self.retry.stall, lambda: size(self._path))


def _options(scheme: str, retry: Retry) -> dict[str, Any]:
    """What fsspec should know beyond its own configuration, from which credentials and endpoints come."""
    if scheme not in ("http", "https"):
        return {}
    import aiohttp
    from fsspec.config import conf

    configured = conf.get(scheme, {}).get("client_kwargs", {})
    headers = {"Accept-Encoding": "identity", **configured.get("headers", {})}  # ranges of a packed file mean others
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=retry.stall, sock_read=retry.stall)
    # trust_env: proxies from the environment and credentials from ~/.netrc, as curl does
    return {"client_kwargs": {"trust_env": True, "timeout": timeout, **configured, "headers": headers}}


def _within(seconds: float, function: Callable[[], Result]) -> Result:
    """The result of a call, or TimeoutError; a call that never returns is left behind in its thread."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="fetch").start()
    return future.result(seconds)


class _Failures:
    """Counts failures in a row: waits after each, or raises what the user should see."""

    def __init__(self, url: str, retry: Retry) -> None:
        self._url = url
        self._retry = retry
        self._count = 0

    def reset(self) -> None:
        self._count = 0

    def add(self, error: Exception, what: str) -> None:
        self._count += 1
        if _is_bug(error):
            raise error
        if _is_permanent(error):
            raise _refusal(self._url, error, what) from error
        if self._count >= self._retry.attempts:
            raise _refusal(self._url, error, f"{what}, tried {self._count} times") from error
        delay = min(self._retry.first_delay * 2 ** (self._count - 1), _LONGEST_DELAY)
        time.sleep(delay * _jitter.uniform(0.5, 1))


def _is_bug(error: Exception) -> bool:
    return isinstance(error, (TypeError, AttributeError, NameError, AssertionError))


def _is_permanent(error: Exception) -> bool:
    """Whether the same request would fail again, however often it is made."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)):
        return True
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    name = type(error).__name__  # of packages that may not be installed
    return isinstance(error, ValueError) or "Credentials" in name or "Certificate" in name


def _status(error: Exception) -> int | None:
    """The HTTP status, where the back ends keep it: aiohttp, gcsfs, huggingface_hub and botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, name in ((error, "status"), (response, "status_code"), (error, "code")):
        value = response if isinstance(response, int) else getattr(holder, name, None)
        if value is not None and str(value).isdigit():
            return int(value)
    return None


def _refusal(url: str, error: Exception, what: str) -> UserError:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return UserError(f"{mask(url)}: no such file", "Is the address right, and has everything been uploaded?")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return UserError(
            f"{mask(url)}: access denied: {_text(error)}",
            "Credentials are taken from where the tools of that storage keep theirs: ~/.aws and AWS_…, gcloud,",
            "HF_TOKEN, ~/.netrc; further options from fsspec's own configuration, ~/.config/fsspec.",
        )
    if status == 416:
        return UserError(
            f"{mask(url)}: is shorter than the index says",
            "It was not uploaded whole, or was written again: upload shards and index.json again.",
        )
    return UserError(f"{mask(url)}: {what}: {_text(error)}", "Start again when it can be reached: what came is kept.")


def _text(error: Exception) -> str:
    status = getattr(error, "status", None)
    if status is not None and hasattr(error, "message"):
        return f"HTTP status {status} {error.message}".strip()
    if isinstance(error, TimeoutError):
        return "no answer in time"
    lines = mask(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
