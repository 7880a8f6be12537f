"""Downloads from a real server that cuts, stalls, refuses, shortens and corrupts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shards import fetch
from shards.errors import UserError
from shards.fetch import Retry, download, is_remote, join_url, mask, read_small
from tests.shards.faulty_server import Fault, FaultyServer, serve

SIZE = 1_000_003
QUICK = Retry(attempts=4, first_delay=0.005, stall=0.4)


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(7).bytes(SIZE)


@pytest.fixture
def server(tmp_path, data):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(data)
    (folder / "index.json").write_bytes(b'{"a": 1}')
    with serve(folder) as running:
        yield running


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(fetch, "PIECE", 256 << 10)


def fetched(server: FaultyServer, tmp_path: Path, retry: Retry = QUICK) -> bytes:
    download(f"{server.url}/a.tar", tmp_path / "a.part", SIZE, retry=retry)
    return (tmp_path / "a.part").read_bytes()


def test_pieces_make_the_file(server, tmp_path, data, small_pieces):
    assert fetched(server, tmp_path) == data
    ranges = server.traffic["a.tar"].ranges
    assert ranges == [(0, 262144), (262144, 524288), (524288, 786432), (786432, SIZE)]
    assert {headers["Accept-Encoding"] for headers in server.headers} == {"identity"}


def test_goes_on_from_what_is_there(server, tmp_path, data):
    (tmp_path / "a.part").write_bytes(data[:700_000])
    assert fetched(server, tmp_path) == data
    assert server.traffic["a.tar"].ranges == [(700_000, SIZE)]


def test_more_than_the_file_is_begun_anew(server, tmp_path, data):
    (tmp_path / "a.part").write_bytes(bytes(SIZE + 1))
    assert fetched(server, tmp_path) == data


def test_nothing_is_asked_for_when_all_is_there(server, tmp_path, data):
    (tmp_path / "a.part").write_bytes(data)
    assert fetched(server, tmp_path) == data
    assert not server.traffic


@pytest.mark.parametrize(
    "fault",
    [Fault(status=500), Fault(status=503), Fault(status=429), Fault(cut=1000), Fault(cut=0), Fault(stall=1)],
    ids=["500", "503", "429", "cut", "cut at once", "stalled"],
)
def test_passing_faults_are_got_over(server, tmp_path, data, small_pieces, fault):
    server.fault = lambda request: fault if request.number in (0, 1, 3) else None
    assert fetched(server, tmp_path) == data


def test_a_link_that_always_breaks_is_got_through_in_smaller_pieces(server, tmp_path, data):
    """Every connection breaks after 200,000 bytes; whole pieces of 16 MiB never arrive."""
    server.fault = lambda request: Fault(cut=200_000) if request.end - request.start > 200_000 else None
    assert fetched(server, tmp_path, Retry(attempts=8, first_delay=0.01, stall=2)) == data


def test_short_pieces_are_progress(server, tmp_path, data, small_pieces):
    server.fault = lambda request: Fault(short=100_000) if request.end - request.start > 150_000 else None
    assert fetched(server, tmp_path) == data


@pytest.mark.parametrize("there", [0, 300_000])
def test_a_server_that_ignores_ranges(server, tmp_path, data, small_pieces, there):
    (tmp_path / "a.part").write_bytes(data[:there])
    server.fault = lambda request: Fault(ignore_range=True)
    assert fetched(server, tmp_path) == data
    assert server.traffic["a.tar"].requests == 1


def test_a_slow_drip_is_an_error_in_the_end(server, tmp_path):
    """Bytes keep coming, so no connection counts as dead; the request as a whole does."""
    server.fault = lambda request: Fault(drip=0.1)
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"a\.tar: cannot be downloaded, tried 2 times: no answer in time"):
        fetched(server, tmp_path, Retry(attempts=2, first_delay=0.01, stall=0.1))
    assert time.perf_counter() - started < 4


def test_giving_up_names_the_place_and_keeps_what_came(server, tmp_path, data, small_pieces):
    server.fault = lambda request: Fault(status=503) if request.start >= 262144 else None
    with pytest.raises(UserError, match=r"/a\.tar: cannot be downloaded, tried 4 times: HTTP status 503") as caught:
        fetched(server, tmp_path)
    assert "what came is kept" in str(caught.value)
    assert (tmp_path / "a.part").read_bytes() == data[:262144]
    assert server.traffic["a.tar"].requests == 1 + 4


def test_progress_gives_new_attempts(server, tmp_path, data, small_pieces):
    """Three failures before each piece, four attempts for each."""
    server.fault = lambda request: Fault(status=500) if request.number % 4 != 3 else None
    assert fetched(server, tmp_path) == data


def test_waiting_grows(server, tmp_path, data):
    times: list[float] = []

    def fail(request):
        times.append(time.perf_counter())
        return Fault(status=500) if request.number < 3 else None

    server.fault = fail
    assert fetched(server, tmp_path, Retry(attempts=4, first_delay=0.1)) == data
    waits = np.diff(times)
    for wait, least in zip(waits, (0.05, 0.1, 0.2), strict=True):
        assert least <= wait < 4 * least + 0.5


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, "access denied"), (401, "access denied"), (410, "HTTP status 410"), (404, "no such file")],
)
def test_what_waiting_cannot_mend_is_said_at_once(server, tmp_path, status, message):
    server.fault = lambda request: Fault(status=status)
    with pytest.raises(UserError, match=message):
        fetched(server, tmp_path)
    assert server.traffic["a.tar"].requests == 1


def test_a_file_shorter_than_the_index_says(server, tmp_path):
    with pytest.raises(UserError, match="shorter than the index says"):
        download(f"{server.url}/a.tar", tmp_path / "a.part", SIZE + 10, retry=QUICK)


def test_a_longer_file_from_a_server_without_ranges(server, tmp_path, small_pieces):
    server.fault = lambda request: Fault(ignore_range=True)
    with pytest.raises(UserError, match=r"has 1,000,003 bytes, should have 999,999"):
        download(f"{server.url}/a.tar", tmp_path / "a.part", 999_999, retry=QUICK)


def test_no_server(tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="tried 4 times"):
        fetched(server, tmp_path)


def test_no_disk(server, tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(UserError, match=r"/dev/full: cannot be written: No space left") as caught:
        download(f"{server.url}/a.tar", full, SIZE, retry=QUICK)
    assert "1,000,003 bytes" in str(caught.value)


def test_small_files(server):
    assert read_small(f"{server.url}/index.json") == b'{"a": 1}'
    server.fault = lambda request: Fault(status=500) if request.number < 2 else None
    assert read_small(f"{server.url}/index.json", retry=QUICK) == b'{"a": 1}'
    with pytest.raises(FileNotFoundError):
        read_small(f"{server.url}/nothing.json")
    with pytest.raises(UserError, match="larger than 7 bytes"):
        read_small(f"{server.url}/index.json", limit=7)
    server.fault = lambda request: Fault(status=403)
    with pytest.raises(UserError, match="access denied"):
        read_small(f"{server.url}/index.json")


def test_other_back_ends(tmp_path, data):
    fsspec.filesystem("memory").pipe_file("/fetch/a.tar", data)
    (tmp_path / "file.tar").write_bytes(data)
    for url in ("memory://fetch/a.tar", f"file://{tmp_path}/file.tar"):
        partial = tmp_path / "a.part"
        partial.write_bytes(data[:1234])
        download(url, partial, SIZE, retry=QUICK)
        assert partial.read_bytes() == data
        with pytest.raises(UserError, match="ends at byte 1,000,003, should have 1,000,004"):
            download(url, partial, SIZE + 1, retry=Retry(attempts=2, first_delay=0.01))
        with pytest.raises(FileNotFoundError):
            read_small(f"{url}x")


def test_schemes(tmp_path):
    with pytest.raises(UserError, match=r"unknown scheme htps://") as caught:
        read_small("htps://host/x")
    assert "Did you mean https://?" in str(caught.value)
    for url, package, extra in (("s3://bucket/x", "s3fs", "s3"), ("gs://bucket/x", "gcsfs", "gcs")):
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(UserError, match=rf"pip install 'onehour\[{extra}\]'"):
                download(url, tmp_path / "x.part", 1)


@pytest.mark.parametrize(
    ("location", "remote"),
    [
        ("https://host/data", True),
        ("s3://bucket", True),
        ("file:///data", True),
        ("/data/imagenet", False),
        ("data", False),
        (r"C:\data", False),
        ("C://data", False),
        ("pipe:cat x", False),
    ],
)
def test_is_remote(location, remote):
    assert is_remote(location) is remote


def test_join_keeps_the_token_of_an_http_root():
    assert join_url("https://host/a/?sig=1%2F2", "b.tar") == "https://host/a/b.tar?sig=1%2F2"
    assert join_url("https://host", "b/c.tar") == "https://host/b/c.tar"
    assert join_url("s3://bucket/a/", "b.tar") == "s3://bucket/a/b.tar"


def test_secrets_are_not_shown(server, tmp_path):
    assert mask("at https://me:secret@host/a.tar?X-Sig=secret, 403") == "at https://***@host/a.tar?*** 403"
    server.fault = lambda request: Fault(status=403)
    url = server.url.replace("://", "://me:secret@") + "/a.tar?token=secret"
    with pytest.raises(UserError) as caught:
        download(url, tmp_path / "a.part", SIZE)
    assert "secret" not in str(caught.value)
    assert server.headers[0]["Authorization"].startswith("Basic ")


def test_the_global_random_state_is_left_alone(server, tmp_path):
    import random

    random.seed(1)
    before = random.getstate()
    server.fault = lambda request: Fault(status=500) if request.number < 2 else None
    fetched(server, tmp_path)
    assert random.getstate() == before


def test_forked_children_download_too_and_nothing_is_left_at_the_end(server, tmp_path):
    """The loop thread of fsspec does not survive a fork; no warning may come at exit."""
    script = """
import os, sys
from pathlib import Path
from shards.fetch import download
url, folder, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
download(url, folder / "parent.part", size)
children = []
for child in range(2):
    process = os.fork()
    if not process:
        download(url, folder / f"{child}.part", size)
        os._exit(0)
    children.append(process)
sys.exit(sum(os.waitpid(process, 0)[1] for process in children))
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", script, f"{server.url}/a.tar", tmp_path, str(SIZE)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("parent", "0", "1"):
        assert (tmp_path / f"{name}.part").read_bytes() == (server.folder / "a.tar").read_bytes()


def test_threads_download_at_once(server, tmp_path, data):
    threads = [
        threading.Thread(target=download, args=(f"{server.url}/a.tar", tmp_path / f"{i}.part", SIZE)) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((tmp_path / f"{i}.part").read_bytes() == data for i in range(8))
