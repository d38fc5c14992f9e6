"""Downloads from servers on this machine that stall, cut, lie, redirect or deliver."""

import hashlib
import io
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gpn_triton.data import download, fetch
from gpn_triton.data.download import HOSTS, MD5

CONTENTS = {part: os.urandom(1) * 50_000 + os.urandom(150_000) for part in ("train", "test")}


def zipped(part, member=None, contents=None):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member or f"shd_{part}.h5", contents or CONTENTS[part])
    return file.getvalue()


ARCHIVES = {part: zipped(part) for part in CONTENTS}
SUMS = {f"shd_{part}": hashlib.md5(archive).hexdigest() for part, archive in ARCHIVES.items()}


class Host:
    """An HTTP server that answers as `behave(handler, body, start)` says, and notes requests."""

    def __init__(self, behave):
        self.requests = []
        self.released = threading.Event()
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
                host.requests.append((self.path, start))
                part = "train" if "train" in self.path else "test"
                behave(self, ARCHIVES[part], start)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.host = self
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/"

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    hosts = []

    def start(behave):
        hosts.append(Host(behave))
        return hosts[-1]

    yield start
    for host in hosts:
        host.close()


def send(handler, body, start=0, length=None, status=None):
    handler.send_response(status or (206 if start else 200))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    if length != "none":
        handler.send_header("Content-Length", str(length or len(body) - start))
    handler.end_headers()
    handler.wfile.write(body[start:])


def good(handler, body, start):
    if start >= len(body):
        handler.send_error(416)
    else:
        send(handler, body, start)


def without_ranges(handler, body, start):
    send(handler, body)


def stalls(handler, body, start):
    """Two thirds of what is asked for, then silence."""
    left = len(body) - start
    send(handler, body[: start + left * 2 // 3], start, length=left)
    handler.wfile.flush()
    handler.server.host.released.wait(20)


def cuts(handler, body, start):
    """Half of what is asked for, then the connection ends."""
    left = len(body) - start
    send(handler, body[: start + left // 2], start, length=left)


def cuts_silently(handler, body, start):
    """Half of the body, said to be all."""
    send(handler, body[: len(body) // 2])


def sends_wrong_bytes(handler, body, start):
    send(handler, b"x" * len(body), start)


def sends_a_page(handler, body, start):
    send(handler, b"<html>moved to a portal</html>", length="none")


def is_missing(handler, body, start):
    handler.send_error(404)


def sends_another_range(handler, body, start):
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 7-{len(body) - 1}/{len(body)}")
    handler.send_header("Content-Length", str(len(body) - 7))
    handler.end_headers()
    handler.wfile.write(body[7:])


def is_silent(handler, body, start):
    handler.server.host.released.wait(20)


def closes_at_once(handler, body, start):
    handler.connection.close()


def fetch_shd(folder, *hosts, timeout=5.0):
    return fetch("shd", folder, True, [host.address for host in hosts], SUMS, timeout)


def assert_complete(folder, files):
    assert {part: path.read_bytes() for part, path in files.items()} == CONTENTS
    assert sorted(os.listdir(folder)) == ["shd_test.h5", "shd_train.h5"]


def test_files_are_fetched_verified_and_unpacked(tmp_path, serve):
    host = serve(good)
    files = fetch_shd(tmp_path / "new" / "data", host)
    assert_complete(tmp_path / "new" / "data", files)
    assert host.requests == [("/shd_train.h5.zip", 0), ("/shd_test.h5.zip", 0)]


def test_files_that_are_there_are_not_fetched_again(tmp_path, serve):
    host = serve(good)
    first = fetch_shd(tmp_path, host)
    host.requests.clear()
    assert fetch_shd(tmp_path, host) == first
    assert fetch("shd", tmp_path, False, [host.address], SUMS) == first
    assert host.requests == []


def test_without_download_one_line_says_what_is_missing_and_where_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        fetch("ssc", tmp_path / "data", False)
    message = str(caught.value)
    for part in ("ssc_train.h5, ssc_valid.h5, ssc_test.h5", str(tmp_path / "data"), "--download"):
        assert part in message
    assert all(host in message for host in HOSTS) and "\n" not in message
    assert not (tmp_path / "data").exists()


def test_an_unknown_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected one of shd, ssc, got 'shc'"):
        fetch("shc", tmp_path, True)


def test_every_file_has_a_known_sum():
    names = {f"{name}_{part}" for name, parts in download.PARTS.items() for part in parts}
    assert set(MD5) == names and all(len(md5) == 32 for md5 in MD5.values())


@pytest.mark.parametrize(
    "fails",
    [
        is_silent,
        stalls,
        cuts,
        cuts_silently,
        sends_wrong_bytes,
        sends_a_page,
        is_missing,
        closes_at_once,
    ],
)
def test_where_the_first_host_fails_the_mirror_delivers(tmp_path, serve, fails):
    assert_complete(tmp_path, fetch_shd(tmp_path, serve(fails), serve(good), timeout=0.3))


def test_a_host_that_cannot_be_reached_is_passed_over(tmp_path, serve):
    gone = serve(good)
    gone.close()
    assert_complete(tmp_path, fetch_shd(tmp_path, gone, serve(good)))


@pytest.mark.parametrize("fails", [stalls, cuts])
def test_the_mirror_goes_on_where_the_first_host_stopped(tmp_path, serve, fails):
    mirror = serve(good)
    fetch_shd(tmp_path, serve(fails), mirror, timeout=0.3)
    assert all(0 < start < 150_000 for _, start in mirror.requests)


def test_a_later_attempt_goes_on_where_the_earlier_stopped(tmp_path, serve):
    first = serve(lambda h, body, start: is_missing(h, body, start) if start else cuts(h, body, 0))
    with pytest.raises(ConnectionError, match="shd_train.h5.zip: no host delivered it"):
        fetch_shd(tmp_path, first)
    assert os.listdir(tmp_path) == ["shd_train.h5.zip.part"]
    have = (tmp_path / "shd_train.h5.zip.part").stat().st_size
    second = serve(good)
    assert_complete(tmp_path, fetch_shd(tmp_path, second))
    assert second.requests[0] == ("/shd_train.h5.zip", have) and have > 0


def test_a_host_that_cuts_again_and_again_still_delivers(tmp_path, serve):
    def cuts_after_20_000(handler, body, start):
        send(handler, body[: start + 20_000], start, length=len(body) - start)

    host = serve(cuts_after_20_000)
    assert_complete(tmp_path, fetch_shd(tmp_path, host))
    assert len(host.requests) > 10


def test_a_host_without_ranges_sends_all_anew(tmp_path, serve):
    (tmp_path / "shd_train.h5.zip.part").write_bytes(ARCHIVES["train"][:1000])
    assert_complete(tmp_path, fetch_shd(tmp_path, serve(without_ranges)))


def test_a_wrong_range_is_not_appended(tmp_path, serve):
    (tmp_path / "shd_train.h5.zip.part").write_bytes(ARCHIVES["train"][:1000])
    mirror = serve(good)
    assert_complete(tmp_path, fetch_shd(tmp_path, serve(sends_another_range), mirror))
    assert mirror.requests[0][1] == 1000


def test_a_complete_part_is_taken_as_it_is(tmp_path, serve):
    (tmp_path / "shd_train.h5.zip.part").write_bytes(ARCHIVES["train"])
    assert_complete(tmp_path, fetch_shd(tmp_path, serve(good)))


@pytest.mark.parametrize("size", [1000, 400_000])
def test_a_part_of_something_else_is_thrown_away_and_fetched_anew(tmp_path, serve, size):
    (tmp_path / "shd_train.h5.zip.part").write_bytes(b"y" * size)
    host = serve(good)
    assert_complete(tmp_path, fetch_shd(tmp_path, host))
    assert [start for _, start in host.requests] == [size, 0, 0]


def test_redirects_are_followed_also_when_resuming(tmp_path, serve):
    target = serve(good)

    def redirects(handler, body, start):
        handler.send_response(302)
        handler.send_header("Location", target.address + "elsewhere" + handler.path)
        handler.end_headers()

    (tmp_path / "shd_train.h5.zip.part").write_bytes(ARCHIVES["train"][:1000])
    assert_complete(tmp_path, fetch_shd(tmp_path, serve(redirects)))
    assert target.requests == [
        ("/elsewhere/shd_train.h5.zip", 1000),
        ("/elsewhere/shd_test.h5.zip", 0),
    ]


def test_a_circle_of_redirects_ends(tmp_path, serve):
    def circles(handler, body, start):
        handler.send_response(302)
        handler.send_header("Location", handler.path)
        handler.end_headers()

    with pytest.raises(ConnectionError, match="302"):
        fetch_shd(tmp_path, serve(circles))


def test_where_all_hosts_fail_one_line_says_how_each_did(tmp_path, serve):
    hosts = [serve(behave) for behave in (is_missing, sends_wrong_bytes, is_silent)]
    with pytest.raises(ConnectionError) as caught:
        fetch_shd(tmp_path, *hosts, timeout=0.2)
    message = str(caught.value)
    reasons = ("HTTP 404", "expected " + SUMS["shd_train"], "silent for 0.2 s")
    for host, reason in zip(hosts, reasons, strict=True):
        assert f"{host.address}shd_train.h5.zip: " in message and reason in message
    assert "\n" not in message and str(tmp_path) in message
    assert os.listdir(tmp_path) == []


def test_a_host_that_does_not_stop_sending_is_stopped(tmp_path, serve, monkeypatch):
    def endless(handler, body, start):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"z" * 100_000)
        except OSError:
            pass

    monkeypatch.setattr(download, "MAX_BYTES", 1_000_000)
    with pytest.raises(ConnectionError, match="sent more than 1000000 bytes"):
        fetch_shd(tmp_path, serve(endless))
    assert not (tmp_path / "shd_train.h5").exists()


@pytest.mark.parametrize(
    ("archive", "expected"),
    [
        (zipped("train", "../other.h5"), "expected one member shd_train.h5, got .'../other.h5'"),
        (zipped("train", "readme.txt"), "expected one member shd_train.h5"),
        (b"PK no archive", "expected a zip archive with shd_train.h5, got: File is not a zip"),
        (zipped("train").replace(CONTENTS["train"][-500:], bytes(500)), "expected a zip archive"),
    ],
)
def test_an_archive_with_other_contents_is_refused(tmp_path, serve, archive, expected):
    host = serve(lambda handler, body, start: send(handler, archive))
    sums = {**SUMS, "shd_train": hashlib.md5(archive).hexdigest()}
    with pytest.raises(ValueError, match=f"shd_train.h5.zip: {expected}"):
        fetch("shd", tmp_path / "data", True, [host.address], sums)
    assert os.listdir(tmp_path) == ["data"]
    assert not (tmp_path / "data" / "shd_train.h5").exists()


@pytest.mark.parametrize(
    "member", ["../../shd_train.h5", "/shd_train.h5", "deep/down/shd_train.h5"]
)
def test_the_file_comes_into_the_folder_whatever_the_archive_claims(tmp_path, serve, member):
    archive = zipped("train", member)
    host = serve(lambda h, body, start: send(h, archive if "train" in h.path else body))
    sums = {**SUMS, "shd_train": hashlib.md5(archive).hexdigest()}
    files = fetch("shd", tmp_path / "a" / "data", True, [host.address], sums)
    assert_complete(tmp_path / "a" / "data", files)
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["data"]


def test_an_archive_put_there_by_hand_is_used_and_kept(tmp_path):
    for part, archive in ARCHIVES.items():
        (tmp_path / f"shd_{part}.h5.zip").write_bytes(archive)
    files = fetch("shd", tmp_path, False, [], SUMS)
    assert {part: path.read_bytes() for part, path in files.items()} == CONTENTS
    assert (tmp_path / "shd_train.h5.zip").exists()


def test_a_wrong_archive_put_there_by_hand_is_ignored_with_a_warning(tmp_path):
    (tmp_path / "shd_train.h5.zip").write_bytes(ARCHIVES["train"][:-1])
    with (
        pytest.warns(UserWarning, match="shd_train.h5.zip: ignored, md5"),
        pytest.raises(FileNotFoundError, match="shd_train.h5, shd_test.h5 not found"),
    ):
        fetch("shd", tmp_path, False, [], SUMS)


def test_a_failed_unpacking_leaves_no_half_file_and_the_archive(tmp_path, serve, monkeypatch):
    def copy(source, target, _):
        target.write(source.read(1000))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", copy)
    with pytest.raises(OSError, match="No space left"):
        fetch_shd(tmp_path, serve(good))
    assert os.listdir(tmp_path) == ["shd_train.h5.zip"]
    monkeypatch.undo()
    fetch_shd(tmp_path, serve(good))
    assert (tmp_path / "shd_train.h5").read_bytes() == CONTENTS["train"]


def test_processes_that_come_together_fetch_once(tmp_path, serve):
    host = serve(good)
    threads = [threading.Thread(target=fetch_shd, args=(tmp_path, host)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path for path, _ in host.requests) == ["/shd_test.h5.zip", "/shd_train.h5.zip"]
    assert sorted(os.listdir(tmp_path)) == ["shd_test.h5", "shd_train.h5"]
