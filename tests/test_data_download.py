"""Downloads from servers on this machine that stall, cut, lie, redirect or deliver."""

import hashlib
import io
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gpn_triton.data.sources import download
from gpn_triton.data.sources.download import HOSTS, MD5, PARTS, fetch

CONTENTS = {part: os.urandom(1) * 50_000 + os.urandom(150_000) for part in ("train", "test")}


def zipped(part, member=None):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member or f"shd_{part}.h5", CONTENTS[part])
    return file.getvalue()


def md5(archive):
    return hashlib.md5(archive).hexdigest()


ARCHIVES = {part: zipped(part) for part in CONTENTS}
SUMS = {f"shd_{part}": md5(archive) for part, archive in ARCHIVES.items()}


class Host:
    """An HTTP server that answers as `behave(handler, body, start)` says, and notes requests."""

    def __init__(self, behave, archives):
        self.requests, self.released, host = [], threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
                host.requests.append((self.path, start))
                behave(self, archives["train" if "train" in self.path else "test"], start)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.host, self.server.daemon_threads = self, True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/"

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve():
    hosts = []

    def start(behave, archives=ARCHIVES):
        hosts.append(Host(behave, archives))
        return hosts[-1]

    yield start
    for host in hosts:
        host.close()


def send(handler, body, start=0, length=None):
    handler.send_response(206 if start else 200)
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


# half of the body, said to be all
def cuts_silently(handler, body, start):
    send(handler, body[: len(body) // 2])


def cuts_after_20_000(handler, body, start):
    send(handler, body[: start + 20_000], start, length=len(body) - start)


def is_missing(handler, body, start):
    handler.send_error(404)


def cuts_once(handler, body, start):
    (is_missing if start else cuts)(handler, body, start)


def is_silent(handler, body, start):
    handler.server.host.released.wait(20)


FAILURES = {
    "is gone": None,
    "is silent": is_silent,
    "stalls": stalls,
    "cuts": cuts,
    "cuts silently": cuts_silently,
    "wrong bytes": lambda handler, body, start: send(handler, b"x" * len(body), start),
    "a page": lambda handler, *_: send(handler, b"<html>moved to a portal</html>", length="none"),
    "is missing": is_missing,
    "closes at once": lambda handler, *_: handler.connection.close(),
}


def fetch_shd(folder, *hosts, timeout=5.0, sums=SUMS):
    return fetch("shd", folder, True, [host.address for host in hosts], sums, timeout)


def assert_complete(folder, files):
    assert {part: path.read_bytes() for part, path in files.items()} == CONTENTS
    assert sorted(os.listdir(folder)) == ["shd_test.h5", "shd_train.h5"]


def test_files_are_fetched_verified_unpacked_and_fetched_once(tmp_path, serve):
    host, folder = serve(good), tmp_path / "new" / "data"
    # by processes that come together
    threads = [threading.Thread(target=fetch_shd, args=(folder, host)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = fetch_shd(folder, host)
    assert_complete(folder, files)
    assert fetch("shd", folder, False, [], SUMS) == files
    assert sorted(host.requests) == [("/shd_test.h5.zip", 0), ("/shd_train.h5.zip", 0)]


def test_without_download_one_line_says_what_is_missing_and_where_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        fetch("ssc", tmp_path / "data", False)
    message = str(caught.value)
    for part in ("ssc_train.h5, ssc_valid.h5, ssc_test.h5", str(tmp_path / "data"), "--download"):
        assert part in message
    assert all(host in message for host in HOSTS) and "\n" not in message
    assert not (tmp_path / "data").exists()
    assert set(MD5) == {f"{name}_{part}" for name, parts in PARTS.items() for part in parts}
    with pytest.raises(ValueError, match="dataset: expected one of shd, ssc, got 'shc'"):
        fetch("shc", tmp_path, True)


@pytest.mark.parametrize("fails", FAILURES)
def test_where_the_first_host_fails_the_mirror_delivers_and_goes_on(tmp_path, serve, fails):
    first, mirror = serve(FAILURES[fails] or good), serve(good)
    if fails == "is gone":
        first.close()
    assert_complete(tmp_path, fetch_shd(tmp_path, first, mirror, timeout=0.3))
    goes_on = fails in ("stalls", "cuts")
    assert all((0 < start < 150_000) == goes_on for _, start in mirror.requests)


def test_a_host_that_cuts_again_and_again_still_delivers_or_a_later_attempt_goes_on(
    tmp_path, serve
):
    host = serve(cuts_after_20_000)
    assert_complete(tmp_path / "a", fetch_shd(tmp_path / "a", host))
    assert len(host.requests) > 10
    folder, part = tmp_path / "b", "shd_train.h5.zip.part"
    with pytest.raises(ConnectionError, match="shd_train.h5.zip: no host delivered it"):
        fetch_shd(folder, serve(cuts_once))
    assert os.listdir(folder) == [part]
    have, second = (folder / part).stat().st_size, serve(good)
    assert_complete(folder, fetch_shd(folder, second))
    assert second.requests[0] == ("/shd_train.h5.zip", have) and have > 0


TRAIN = ARCHIVES["train"]
PARTIAL = {
    "resumed": (TRAIN[:1000], good, [1000, 0]),
    "no ranges": (TRAIN[:1000], lambda handler, body, _: send(handler, body), [1000, 0]),
    "another range": (
        TRAIN[:1000], lambda handler, body, start: send(handler, body, 7 if start else 0),
        [1000, 0, 0],
    ),
    "complete": (TRAIN, good, [len(TRAIN), 0]),
    "of something else": (b"y" * 1000, good, [1000, 0, 0]),
    "too long": (b"y" * 400_000, good, [400_000, 0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTIAL)
def test_a_part_that_lies_there_is_completed_or_thrown_away(tmp_path, serve, case):
    part, behave, starts = PARTIAL[case]
    (tmp_path / "shd_train.h5.zip.part").write_bytes(part)
    host = serve(behave)

    def redirects(handler, *_):
        handler.send_response(302)
        handler.send_header("Location", host.address.rstrip("/") + handler.path)
        handler.end_headers()

    # redirects are followed, also when resuming
    assert_complete(tmp_path, fetch_shd(tmp_path, serve(redirects)))
    assert [start for _, start in host.requests] == starts


def test_where_all_hosts_fail_one_line_says_how_each_did(tmp_path, serve):
    hosts = [serve(behave) for behave in (is_missing, FAILURES["wrong bytes"], is_silent)]
    with pytest.raises(ConnectionError) as caught:
        fetch_shd(tmp_path, *hosts, timeout=0.2)
    message = str(caught.value)
    reasons = ("HTTP Error 404: Not Found", "expected " + SUMS["shd_train"], "timed out")
    for host, reason in zip(hosts, reasons, strict=True):
        assert reason in message.split(f"{host.address}shd_train.h5.zip: ")[1].split("; ")[0]
    assert "\n" not in message and str(tmp_path) in message
    assert os.listdir(tmp_path) == []


OTHER_ARCHIVES = {
    "another member": (
        zipped("train", "../other.h5"), "expected one member shd_train.h5, got .'../other.h5'",
    ),
    "no archive": (
        b"PK no archive", "expected a zip archive with shd_train.h5, got: File is not a zip",
    ),
    "damaged": (TRAIN.replace(CONTENTS["train"][-500:], bytes(500)), "expected a zip archive"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_ARCHIVES)
def test_an_archive_with_other_contents_is_refused(tmp_path, serve, case):
    archive, expected = OTHER_ARCHIVES[case]
    host, sums = serve(good, {"train": archive}), {**SUMS, "shd_train": md5(archive)}
    with pytest.raises(ValueError, match=f"shd_train.h5.zip: {expected}"):
        fetch_shd(tmp_path / "data", host, sums=sums)
    assert os.listdir(tmp_path) == ["data"]
    assert not (tmp_path / "data" / "shd_train.h5").exists()


@pytest.mark.parametrize("member", ["../../shd_train.h5", "/shd_train.h5", "down/shd_train.h5"])
def test_the_file_comes_into_the_folder_whatever_the_archive_claims(tmp_path, serve, member):
    archives = {**ARCHIVES, "train": zipped("train", member)}
    folder, sums = tmp_path / "a" / "data", {**SUMS, "shd_train": md5(archives["train"])}
    assert_complete(folder, fetch_shd(folder, serve(good, archives), sums=sums))
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["data"]


def test_archives_put_there_by_hand_are_used_and_kept_and_wrong_ones_named(tmp_path):
    for part, archive in ARCHIVES.items():
        (tmp_path / f"shd_{part}.h5.zip").write_bytes(archive[: -1 if part == "test" else None])
    with (
        pytest.warns(UserWarning, match="shd_test.h5.zip: ignored, md5"),
        pytest.raises(FileNotFoundError, match="^shd_test.h5 not found"),
    ):
        fetch("shd", tmp_path, False, [], SUMS)
    assert (tmp_path / "shd_train.h5").read_bytes() == CONTENTS["train"]
    assert (tmp_path / "shd_train.h5.zip").exists()


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
