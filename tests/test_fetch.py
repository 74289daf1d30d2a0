"""Promise: data sets come whole, verified and only into their folder.

Whatever the server, the line and the archive do.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torchvision.datasets as tv
from helpers.pickles import cifar_world, python2

from fpl.data import archives, datasets, fetch, files
from fpl.data.datasets import domainnet10
from fpl.data.datasets.layouts import File
from fpl.data.manifest import SPLITS

CONTENT = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` by name; `server.does` says how it misbehaves."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, does = self.server, self.server.does
        name = self.path.rsplit("/")[-1]
        asked = self.headers.get("Range")
        server.asked.append((name, asked))
        content = server.files.get(name)
        tag = self.headers.get("If-Range", server.tag)
        if tag != server.tag and not does.get("no If-Range"):
            asked = None
        if "to" in does:
            return self.answer(302, b"", {"Location": does["to"]})
        if "waits" in does:
            does["waits"].wait()
        if "drops" in does:
            return self.drops(does["drops"])
        if content is None or "status" in does:
            return self.answer(does.get("status", 404), b"")
        if len(server.asked) <= does.get("busy", 0):
            return self.answer(503, b"")
        begin = (
            int(asked.removeprefix("bytes=").removesuffix("-"))
            if asked and not does.get("no ranges")
            else 0
        )
        if begin >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        first = begin + does.get("other part", 0)
        part = f"bytes {first}-{len(content) - 1}/{len(content)}"
        headers = {"ETag": server.tag} if server.tag else {}
        headers |= ({"Content-Range": part} if begin else {}) | does.get("headers", {})
        if does.get("chunked"):
            return self.chunked(
                content[begin:], cut="cut" in does and len(server.asked) <= does["cut"]
            )
        part = content[begin:]
        cut = len(server.asked) <= does.get("cut", 0)
        self.answer(
            206 if begin else 200, part[: len(part) // 2] if cut else part, headers, len(part)
        )
        if cut:
            self.close_connection = True

    def answer(self, status, body, headers=None, stated=None):
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body) if stated is None else stated),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        stops = self.server.does.get("stops")
        self.wfile.write(body[:1000] if stops else body)
        if stops:
            stops.wait()
            self.wfile.write(body[1000:])

    def drops(self, whole):
        """Answer with a byte now and then, as long as somebody waits."""
        with contextlib.suppress(OSError):
            for i in range(2000):
                self.wfile.write(whole[i : i + 1] or b" ")
                time.sleep(0.02)
        self.close_connection = True

    def chunked(self, body, cut):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(
            b"%x\r\n%s\r\n" % (len(body), body[: len(body) // 2] if cut else body)
            + (b"" if cut else b"0\r\n\r\n")
        )
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "*")
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving.daemon_threads = True
    serving.files, serving.does, serving.asked = {"x.bin": CONTENT}, {}, []
    serving.tag = '"first"'
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


def base(server):
    return f"http://127.0.0.1:{server.server_port}/some/folder/"


def of(server, **changes):
    md5 = hashlib.md5(CONTENT).hexdigest()
    return dataclasses.replace(File("x.bin", f"{base(server)}x.bin", len(CONTENT), md5), **changes)


def get(server, path, **changes):
    fetch.download(of(server, **changes), path)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == [path.name]


# --- downloads ------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(server, tmp_path):
    get(server, tmp_path / "x.bin")
    get(server, tmp_path / "x.bin")
    assert server.asked == [("x.bin", None)]


@pytest.mark.parametrize("known", [{}, {"size": 0, "md5": ""}])
@pytest.mark.parametrize("does", [{}, {"no ranges": True}, {"chunked": True, "no ranges": True}])
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_broken_connection_is_taken_up_again(cut, does, known, server, tmp_path):
    server.does = does | {"cut": cut}
    get(server, tmp_path / "x.bin", **known)
    begins = [0 if asked is None else int(asked[6:-1]) for _, asked in server.asked]
    assert len(begins) == cut + 1 and begins == sorted(begins)
    if cut and not does:
        assert begins[1] == len(CONTENT) // 2


def test_a_killed_download_goes_on_where_it_was(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(CONTENT[:1000])
    get(server, tmp_path / "x.bin")
    assert server.asked == [("x.bin", "bytes=1000-")]


def test_a_download_killed_before_its_last_step_is_not_made_again(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(CONTENT)
    get(server, tmp_path / "x.bin")
    assert server.asked == [("x.bin", f"bytes={len(CONTENT)}-")]


@pytest.mark.parametrize("does", [{"other part": 7}, {}])
def test_a_part_that_does_not_fit_is_thrown_away(does, server, tmp_path):
    server.does = does
    (tmp_path / "x.bin.part").write_bytes(CONTENT[:10] if does else CONTENT * 2)
    get(server, tmp_path / "x.bin")
    assert [asked for _, asked in server.asked][-1] is None


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.does = {"busy": 3}
    get(server, tmp_path / "x.bin")


def test_a_server_that_only_breaks_off_is_given_up_and_what_came_is_kept(server, tmp_path):
    server.does = {"cut": 10**6, "no ranges": True}
    ended = f"x.bin: the connection ended after 5120 of {len(CONTENT)} bytes"
    with pytest.raises(OSError, match=f"{ended}; fetch again to go on"):
        fetch.download(of(server), tmp_path / "x.bin")
    assert len(server.asked) == fetch.TRIES and (tmp_path / "x.bin.part").stat().st_size == 5120


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 10240\r\n\r\n"


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\nX: ", HEAD, HEAD.replace(b"h: 1", b"h: +")])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(sent, server, tmp_path, monkeypatch):
    server.does = {"drops": sent}
    monkeypatch.setattr(fetch, "WINDOW", 0.1)
    monkeypatch.setattr(fetch, "TRIES", 2)
    with pytest.raises(OSError, match="x.bin: the server sends less than 131072 bytes in 0.1 sec"):
        fetch.download(of(server), tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()


def left_behind(part):
    """Return the requests that wait for more of a part."""
    requests = [thread for thread in threading.enumerate() if isinstance(thread, fetch.Request)]
    return [request for request in requests if request.part == part]


@pytest.mark.parametrize("where", ["waits", "stops"])
@pytest.mark.parametrize("does", [{}, {"no ranges": True}, {"other part": 7}, {"status": 416}])
def test_a_request_that_is_left_behind_touches_no_file(does, where, server, tmp_path, monkeypatch):
    if "status" in does:
        server.files = {}
    answer = threading.Event()
    server.does = does | {where: answer}
    monkeypatch.setattr(fetch, "WINDOW", 0.3)
    part = tmp_path / "x.bin.part"
    part.write_bytes(CONTENT[:100])
    with pytest.raises(OSError):
        fetch.attempt(of(server), part, time.monotonic() + 600)
    left = left_behind(part)
    part.write_bytes(CONTENT[:2000])  # another request goes on
    answer.set()
    for request in left:
        request.join()
    assert part.read_bytes() == CONTENT[:2000]


def test_a_request_is_left_behind_by_whoever_stops_waiting(server, tmp_path, monkeypatch):
    """As in a notebook, where the process goes on."""
    server.does = {"waits": threading.Event()}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(fetch.Request, "join", interrupted)
        fetch.attempt(of(server), tmp_path / "x.bin.part", time.monotonic() + 600)
    (request,) = left_behind(tmp_path / "x.bin.part")
    server.does["waits"].set()
    request.join()
    assert not list(tmp_path.iterdir())


def test_a_download_ends_after_a_day_and_a_later_one_goes_on(server, tmp_path, monkeypatch):
    server.does = {"drops": HEAD}
    monkeypatch.setattr(fetch, "TOTAL", 0.1)
    monkeypatch.setattr(fetch, "LEAST", 0)
    with pytest.raises(OSError, match="fetch again to go on"):
        fetch.download(of(server), tmp_path / "x.bin")
    assert len(server.asked) == 1


@pytest.mark.parametrize("does", [{}, {"no If-Range": True}])
@pytest.mark.parametrize("known", [{"md5": ""}, {"size": 0, "md5": ""}])
def test_two_versions_of_a_file_do_not_become_one(known, does, server, tmp_path):
    server.does = {"cut": 1}
    file = of(server, **known)
    with pytest.raises(OSError, match="ended after 5120"):
        fetch.attempt(file, tmp_path / "x.bin.part", time.monotonic() + 600)
    server.does, server.tag = does, '"second"'
    server.files["x.bin"] = CONTENT[::-1]
    fetch.download(file, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT[::-1]
    assert server.asked[1] == ("x.bin", "bytes=5120-")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_two_versions_do_not_become_one_where_a_call_is_killed_between(
    server, tmp_path, monkeypatch
):
    server.does = {"cut": 1}
    file = of(server, md5="")
    part = tmp_path / "x.bin.part"
    with pytest.raises(OSError, match="ended after 5120"):
        fetch.attempt(file, part, time.monotonic() + 600)
    server.does, server.tag = {}, '"second"'
    server.files["x.bin"] = CONTENT[::-1]
    write = Path.write_text

    def killed(path, *text):
        write(path, *text)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_text", killed)
        fetch.Request(file, part).receive()
    fetch.download(file, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("tag", ["", 'W/"first"'])
def test_a_part_of_no_version_is_not_continued_unless_a_checksum_tells(tag, server, tmp_path):
    server.tag = tag
    server.does = {"cut": 1}
    get(server, tmp_path / "x.bin", md5="")
    assert [asked for _, asked in server.asked] == [None, None]


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ({"to": "file:///etc/passwd"}, "'file:///etc/passwd' is not allowed"),
        ({"to": "ftp://127.0.0.1/x"}, "x.bin sends on to ftp://127.0.0.1/x"),
        ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "x.bin gives a web page"),
        ({"headers": {"Content-Encoding": "gzip"}}, "x.bin gives a web page or packed file"),
        ({"headers": {"Content-Length": "-1"}}, "x.bin does not say how long"),
        ({"headers": {"Content-Length": str(2**40)}}, "x.bin has 1099511627776 bytes, more than"),
    ],
)
def test_what_cannot_be_the_file_is_not_asked_for_again(does, message, server, tmp_path):
    server.does = does
    with pytest.raises(ValueError, match=message):
        fetch.download(of(server, size=0, md5=""), tmp_path / "x.bin")
    assert len(server.asked) == 1 and not list(tmp_path.iterdir())


def test_without_a_size_there_is_a_limit(server, tmp_path, monkeypatch):
    server.does = {"chunked": True}
    monkeypatch.setattr(fetch, "LISTS", 100)
    with pytest.raises(ValueError, match="sends more than 100 bytes"):
        fetch.download(of(server, size=0), tmp_path / "x.bin")


def test_what_is_no_file_is_not_read(server, tmp_path):
    os.mkfifo(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin is no file: delete it"):
        fetch.download(of(server, size=0), tmp_path / "x.bin")


def test_an_unreachable_server_is_given_up(server, tmp_path):
    file = of(server, url="http://127.0.0.1:9/x.bin")
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/x.bin: .*refused.*put the file at"):
        fetch.download(file, tmp_path / "x.bin")


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_gone_is_not_asked_for_again(status, server, tmp_path):
    server.does = {"status": status}
    with pytest.raises(ValueError, match=f"x.bin answers {status}"):
        fetch.download(of(server), tmp_path / "x.bin")
    assert len(server.asked) == 1


@pytest.mark.parametrize("wrong", [{"md5": "0" * 32}, {"md5": "0" * 32, "size": 0}])
def test_a_wrong_checksum_leaves_nothing_behind(wrong, server, tmp_path):
    found = hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(ValueError, match=f"MD5 {found} where 0000.* was published: it is removed"):
        fetch.download(of(server, **wrong), tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


def test_a_wrong_size_is_seen_before_anything_is_received(server, tmp_path):
    with pytest.raises(ValueError, match="has 10240 bytes where 10241 were published"):
        fetch.download(of(server, size=len(CONTENT) + 1), tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


def test_a_server_that_sends_too_much_is_stopped(server, tmp_path):
    server.does = {"chunked": True}
    with pytest.raises(ValueError, match="sends more than 100 bytes"):
        fetch.download(of(server, size=100), tmp_path / "x.bin")


def test_a_file_that_was_there_is_verified_and_not_touched(server, tmp_path):
    path = tmp_path / "x.bin"
    for content, message in (
        (CONTENT[:-1], "10239 bytes where 10240"),
        (CONTENT[:-1] + b"?", "has the MD5"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{message}.*delete it and fetch again"):
            fetch.download(of(server), path)
        assert path.read_bytes() == content and not server.asked


def test_a_full_disk_is_seen_before_anything_is_received(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 95, 5))
    with pytest.raises(ValueError, match="needs 10240 bytes more"):
        fetch.download(of(server), tmp_path / "x.bin")


# --- archives -------------------------------------------------------------------------------------


def zipped(entries, method=zipfile.ZIP_DEFLATED):
    """entries: (name, content, Unix mode or None)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as z:
        for name, content, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode or 0) << 16
            z.writestr(info, content, method)
    return out.getvalue()


def tarred(entries):
    """entries: (name, content, changes to the header)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, content, changes in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in (changes or {}).items():
                setattr(info, key, value)
            t.addfile(info, io.BytesIO(content))
    return out.getvalue()


def headers_only():
    """Headers for all files, one behind the other, of which none comes."""
    one = tarfile.TarInfo.create_pax_global_header({"comment": "c" * 2**14})
    return gzip.compress(one * 100)


def negative():
    """A member whose size leads back to its own header."""
    info = tarfile.TarInfo("n")
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = (2**96 - 1024).to_bytes(12, "big")  # -1024 as GNU writes it
    raw[148:156] = b"%06o\0 " % (256 + sum(raw[:148]) + sum(raw[156:]))
    return gzip.compress(bytes(raw) * 4 + bytes(1024))


def files_under(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def place(tmp_path):
    """An archive's folder inside another, so that what leaves it is seen."""
    (tmp_path / "out" / "in").mkdir(parents=True)
    return tmp_path / "out" / "in"


def unpack(content, place, name="a.zip", **more):
    archive = place.parent.parent / name
    archive.write_bytes(content)
    archives.extract(archive, place, **more)


GOOD = [
    ("./", b"", {"type": tarfile.DIRTYPE}),
    ("set/a.txt", b"A", None),
    ("set/deep/er/b.jpg", b"B" * 9999, None),
    ("o.txt", b"o", None),
]
BOTH = pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.zip", lambda e: zipped([(n, c, None) for n, c, _ in e])),
        ("a.tar.gz", tarred),
        ("a.tgz", tarred),
    ],
)


@BOTH
def test_archives_are_unpacked(name, pack, place):
    unpack(pack(GOOD), place, name)
    assert files_under(place) == {
        "set/a.txt": b"A",
        "set/deep/er/b.jpg": b"B" * 9999,
        "o.txt": b"o",
    }


@BOTH
def test_only_the_asked_folders_are_unpacked(name, pack, place):
    unpack(pack(GOOD), place, name, top="set")
    assert files_under(place).keys() == {"set/a.txt", "set/deep/er/b.jpg"}
    shutil.rmtree(place / "set")
    unpack(pack(GOOD), place, name, only=("deep",))
    assert files_under(place).keys() == {"set/deep/er/b.jpg"}
    with pytest.raises(ValueError, match="holds no files in a folder other to unpack"):
        unpack(pack(GOOD), place, name, top="other")


SPARSE = {f"GNU.sparse.{key}": value for key, value in (("major", "1"), ("minor", "0"))}
SPARSE |= {"GNU.sparse.name": "n", "GNU.sparse.realsize": "no"}
LINK, DEVICE = stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644
HOSTILE = {
    "zip: a parent": (
        "a.zip",
        zipped([("../escaped.txt", b"x", None)]),
        "'../escaped.txt' leads out of",
    ),
    "zip: a parent in the middle": (
        "a.zip",
        zipped([("set/../../escaped.txt", b"x", None)]),
        "leads out of",
    ),
    "zip: an absolute path": (
        "a.zip",
        zipped([("/tmp/fpl_escaped.txt", b"x", None)]),
        "'/tmp/fpl_escaped.txt' leads out of",
    ),
    "zip: a backslash": ("a.zip", zipped([("..\\escaped.txt", b"x", None)]), "has a backslash"),
    "zip: the folder itself": ("a.zip", zipped([(".", b"x", None)]), "'.' leads out of"),
    "zip: a link": (
        "a.zip",
        zipped([("set", b"/tmp", LINK), ("set/escaped.txt", b"x", None)]),
        "'set' is a link or a device",
    ),
    "zip: a device": ("a.zip", zipped([("pipe", b"", DEVICE)]), "'pipe' is a link or a device"),
    "zip: a bomb": (
        "a.zip",
        zipped([("zeros", bytes(2**21), None)]),
        "its member 'zeros' is beyond the limit of 1048576 bytes",
    ),
    "zip: many empty files": (
        "a.zip",
        zipped([(f"{i}", b"", None) for i in range(300)]),
        "is beyond the limit of",
    ),
    "tar: a parent": (
        "a.tgz",
        tarred([("../escaped.txt", b"x", None)]),
        "'../escaped.txt' leads out of",
    ),
    "tar: an absolute path": (
        "a.tgz",
        tarred([("/tmp/fpl_escaped.txt", b"x", None)]),
        "leads out of",
    ),
    "tar: a link": (
        "a.tgz",
        tarred([("set", b"", {"type": tarfile.SYMTYPE, "linkname": ".."})]),
        "'set' is a link or a device",
    ),
    "tar: a hard link": (
        "a.tgz",
        tarred([("p", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})]),
        "'p' is a link or a device",
    ),
    "tar: a link inside": (
        "a.tgz",
        tarred([("p", b"", {"type": tarfile.SYMTYPE, "linkname": "q"})]),
        "'p' is a link or a device",
    ),
    "tar: a device": (
        "a.tgz",
        tarred([("d", b"", {"type": tarfile.CHRTYPE})]),
        "'d' is a link or a device",
    ),
    "tar: a pipe": (
        "a.tgz",
        tarred([("d", b"", {"type": tarfile.FIFOTYPE})]),
        "'d' is a link or a device",
    ),
    "tar: a bomb": (
        "a.tgz",
        tarred([("zeros", bytes(2**21), None)]),
        "is beyond the limit of 1048576 bytes",
    ),
    "tar: a header as large as memory": (
        "a.tgz",
        tarred([("n" * 2**25, b"", None)]),
        "a header asks for 3355",
    ),
    "tar: a pax header as large as memory": (
        "a.tgz",
        tarred([("n", b"", {"pax_headers": {"comment": "c" * 2**25}})]),
        "a header asks for 3355",
    ),
    "tar: no name that a file can have": (
        "a.tgz",
        tarred([("n", b"", {"pax_headers": {"path": "a\0b"}})]),
        "leads out of",
    ),
    "tar: headers only": ("a.tgz", headers_only(), "a header asks for 16896 bytes"),
    "tar: zeros for ever": (
        "a.tgz",
        gzip.compress(gzip.decompress(tarred([("n", b"", None)])) + bytes(2**21)),
        "it ends in more than 1048576 zeros",
    ),
    "tar: back to the beginning": ("a.tgz", negative(), "a header"),
    "zip: a file for a folder": (
        "a.zip",
        zipped([("a", b"x", None), ("a/b", b"x", None)]),
        "its member 'a/b' has no place at .+ (File exists)",
    ),
    "tar: a folder for a file": (
        "a.tgz",
        tarred([("a/b", b"x", None), ("a", b"x", None)]),
        "its member 'a' has no place at .+ (Is a directory)",
    ),
    "zip: too long a name": (
        "a.zip",
        zipped([("n" * 300, b"x", None)]),
        "its member 'nnn.+ has no place at .+ (File name too long)",
    ),
    "tar: gaps of no size": (
        "a.tgz",
        tarred([("n", b"1\n0\n1\n" + bytes(900), {"pax_headers": SPARSE})]),
        "a.tgz is damaged (invalid literal .+no.+)",
    ),
    "tar: gaps at no place": (
        "a.tgz",
        tarred([("n", b"x", {"pax_headers": SPARSE})]),
        "a.tgz is damaged (not enough values .+)",
    ),
    "zip: memory for a dictionary": (
        "a.zip",
        zipped([("n", b"x", None)], zipfile.ZIP_LZMA),
        "'n' is not packed in the usual way",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_by_its_member_and_nothing_leaves_the_folder(
    kind, place, tmp_path
):
    name, content, message = HOSTILE[kind]
    with pytest.raises(ValueError, match=re.sub(r"\.\.|[()]", r"\\\g<0>", message)):
        unpack(content, place, name, limit=2**20)
    assert {p for p in files_under(tmp_path) if not p.startswith("out/in/")} == {name}
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))
    assert not Path("/tmp/fpl_escaped.txt").exists()


@BOTH
def test_the_number_of_members_is_bounded(name, pack, place, monkeypatch):
    monkeypatch.setattr(archives, "MEMBERS", 3)
    with pytest.raises(ValueError, match=r"'o\.txt' is beyond the limit of 3 members"):
        unpack(pack(GOOD), place, name)
    monkeypatch.setattr(archives, "DIRECTORY", 150)
    if name == "a.zip":
        with pytest.raises(ValueError, match="its list of members has more than 150 bytes"):
            unpack(pack(GOOD), place, name)


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def with_a_broken_header():
    """A sound tar.gz in which the second of three headers is none: tarfile ends there silently."""
    raw = bytearray(gzip.decompress(tarred([(f"{i}.txt", b"x" * 600, None) for i in range(3)])))
    raw[1536 + 100 : 1536 + 157] = b"?" * 57
    return gzip.compress(bytes(raw))


ENCRYPTED = zipped([("x.txt", b"x", None)]).replace(
    b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
)
PACKED = {
    "a.zip": zipped([("x.txt", os.urandom(5000), None)]),
    "a.tgz": tarred([("x.txt", os.urandom(5000), None)]),
}
DAMAGED = {
    "no zip": ("a.zip", b"<html>sign in</html>"),
    "no gzip": ("a.tgz", b"<html>sign in</html>"),
    "no tar": ("a.tgz", gzip.compress(b"<html>sign in</html>" * 99)),
    "nothing in a zip file": ("a.zip", b""),
    "nothing in a tgz file": ("a.tgz", b""),
    "a cut zip": ("a.zip", PACKED["a.zip"][:3000]),
    "a cut tgz": ("a.tgz", PACKED["a.tgz"][:3000]),
    "a bit of a zip": ("a.zip", flipped(PACKED["a.zip"], 2000)),
    "the last bytes of a tgz": ("a.tgz", flipped(PACKED["a.tgz"], len(PACKED["a.tgz"]) - 7)),
    "a header in a tgz": ("a.tgz", with_a_broken_header()),
    "an encrypted zip": ("a.zip", ENCRYPTED),
    "a zip of no name": ("a.zip", zipped([("n", b"", None)]).replace(b"n", b"\0")),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_archive_is_told(kind, place):
    name, content = DAMAGED[kind]
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.+\): delete it and fetch again"):
        unpack(content, place, name)


# --- whole data sets ------------------------------------------------------------------------------


def served(server, monkeypatch, name, content):
    """Describe a data set as it is, but with the local server, which has the files `content`."""
    server.files = content

    def local(file):
        if not file.url:
            return file
        there = content.get(Path(file.path).name, b"")
        url = base(server) + Path(file.path).name
        return dataclasses.replace(
            file, url=url, size=len(there), md5=hashlib.md5(there).hexdigest()
        )

    dataset = datasets.DATASETS[name]
    here = dataclasses.replace(dataset, files=tuple(map(local, dataset.files)))
    monkeypatch.setitem(datasets.DATASETS, name, here)


def tree(folder):
    """A folder packed as the authors pack it, with the folder entries and without its own name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for path in sorted(folder.rglob("*")):
            t.add(path, path.relative_to(folder), recursive=False)
    return out.getvalue()


def small(name, made):
    """The archives of a small data set in their real formats."""
    if name == "flowers102":
        from scipy.io import savemat

        savemat(made / "imagelabels.mat", {"labels": [[1, 2, 1, 2]]})
        savemat(made / "setid.mat", {"trnid": [[1, 2]], "valid": [[3]], "tstid": [[4]]})
        jpg = tarred([(f"jpg/image_{i:05d}.jpg", b"jpeg", None) for i in (1, 2, 3, 4)])
        return {"102flowers.tgz": jpg} | {
            f: (made / f).read_bytes() for f in ("imagelabels.mat", "setid.mat")
        }
    if name == "oxfordpets":
        lists = [
            ("annotations/trainval.txt", b"Bengal_1 1 1 1\n", None),
            ("annotations/test.txt", b"Bengal_2 1 1 1\n", None),
        ]
        images = [(f"images/Bengal_{i}.jpg", b"jpeg", None) for i in (1, 2)]
        return {"images.tar.gz": tarred(images), "annotations.tar.gz": tarred(lists)}
    if name == "food101":
        lists = [
            (f"food-101/meta/{s}.json", json.dumps({"waffles": [f"waffles/{s}"]}).encode(), None)
            for s in ("train", "test")
        ]
        images = [(f"food-101/images/waffles/{s}.jpg", b"jpeg", None) for s in ("train", "test")]
        return {"food-101.tar.gz": tarred([*lists, *images])}
    if name == "caltech101":
        inner = tarred(
            [
                (f"101_ObjectCategories/{c}/image_{i:04d}.jpg", b"j", None)
                for c in ("Faces", "ant")
                for i in range(9)
            ]
        )
        more = [
            ("caltech-101/Annotations.tar", b"not needed", None),
            ("__MACOSX/caltech-101/._Annotations.tar", b"x", None),
        ]
        return {
            "caltech-101.zip": zipped(
                [("caltech-101/101_ObjectCategories.tar.gz", inner, None), *more]
            )
        }
    if name == "dtd":
        lists = [
            (f"dtd/labels/{s}1.txt", f"banded/banded_{s}.jpg\n".encode(), None) for s in SPLITS
        ]
        images = [(f"dtd/images/banded/banded_{s}.jpg", b"jpeg", None) for s in SPLITS]
        return {"dtd-r1.0.1.tar.gz": tarred([*lists, *images])}
    if name == "domainnet10":
        files = {
            f"{d}_{s}.txt": f"{d}/whale/{s}.jpg 1\n{d}/zigzag/1.jpg 2\n".encode()
            for d in domainnet10.DOMAINS
            for s in ("train", "test")
        }
        images = ("whale/train.jpg", "whale/test.jpg", "zigzag/1.jpg")
        return files | {
            f"{d}.zip": zipped([(f"{d}/{i}", b"jpeg", None) for i in images])
            for d in domainnet10.DOMAINS
        }
    cifar_world(made, name, python2)
    return {f"{name.replace('cifar', 'cifar-')}-python.tar.gz": tree(made / name)}


@pytest.mark.parametrize("name", [*datasets.DATASETS][:8])  # which `small` makes
def test_a_set_is_fetched_into_what_its_reader_reads_and_not_a_second_time(
    name, server, tmp_path, monkeypatch
):
    (tmp_path / "made").mkdir()
    served(server, monkeypatch, name, small(name, tmp_path / "made"))
    root = tmp_path / "data"
    left = fetch.fetch(name, root)
    manifest = datasets.read(name, root)
    assert manifest.folder == root / datasets.DATASETS[name].folders[0]
    assert all((manifest.folder / row["path"]).exists() for row in manifest.rows)
    assert not list(root.rglob("zigzag")) and not (root / "__MACOSX").exists()
    assert len(left) == ("cifar" not in name)
    asked = len(server.asked)
    assert fetch.fetch(name, root) == left and len(server.asked) == asked
    for archive in [p for p in root.rglob("*") if p.name.endswith((".zip", ".tgz", ".tar.gz"))]:
        archive.unlink()  # they may go once unpacked
    assert fetch.fetch(name, root) == left and len(server.asked) == asked


def test_a_fetch_that_was_killed_while_unpacking_goes_on(server, tmp_path, monkeypatch):
    served(server, monkeypatch, "dtd", small("dtd", tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "copyfileobj", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fetch.fetch("dtd", tmp_path)
    fetch.fetch("dtd", tmp_path)
    assert len(datasets.read("dtd", tmp_path).rows) == 3 and len(server.asked) == 1


@pytest.mark.parametrize("archive_kept", [True, False])
@pytest.mark.parametrize("name", ["dtd", "caltech101"])
def test_what_is_gone_or_cut_after_unpacking_comes_again(
    name, archive_kept, server, tmp_path, monkeypatch
):
    (tmp_path / "made").mkdir()
    served(server, monkeypatch, name, small(name, tmp_path / "made"))
    root = tmp_path / "data"
    fetch.fetch(name, root)
    if not archive_kept:
        for archive in [path for path in root.rglob("*") if path.name.endswith(".gz")]:
            archive.unlink()
        for archive in root.rglob("*.zip"):
            archive.unlink()
    whole = files_under(root)
    first, last = sorted(path for path in whole if path.endswith(".jpg") or "labels" in path)[::2][
        :2
    ]
    asked = len(server.asked)
    for harm in (lambda: (root / first).unlink(), lambda: (root / last).write_bytes(b"")):
        harm()
        fetch.fetch(name, root)
        found = files_under(root)
        assert {path: found[path] for path in whole} == whole
    assert (len(server.asked) > asked) != archive_kept


def test_what_has_no_stable_source_is_asked_for_by_name_and_place_and_unpacked_when_it_is_there(
    tmp_path,
):
    (line,) = fetch.fetch("office_caltech10", tmp_path)
    archive = tmp_path / "office_caltech_10_dataset.zip"
    assert f"bring {archive.name} (images and split, linked in " in line and line.endswith(
        f"put it at {archive}"
    )
    images = [
        (f"office_caltech_10/{d}/mug/{i}.jpg", b"x", None)
        for d in ("amazon", "caltech", "dslr", "webcam")
        for i in range(5)
    ]
    lists = [("office_caltech_10/amazon_train.pkl", b"x", None)]
    archive.write_bytes(zipped([*images, *lists, ("dtd/images/escaped.txt", b"x", None)]))
    assert fetch.fetch("office_caltech10", tmp_path) == []
    assert (
        len(datasets.read("office_caltech10", tmp_path, "folders").rows) == 20
        and archive.exists()
        and not (tmp_path / "dtd").exists()
    )
    archive.unlink()
    assert fetch.fetch("office_caltech10", tmp_path) == []
    (tmp_path / images[0][0]).unlink()
    assert fetch.fetch("office_caltech10", tmp_path) == [line]


@pytest.mark.parametrize("name", ["flowers102", "oxfordpets", "food101", "caltech101", "dtd"])
def test_the_split_of_coop_is_asked_for_until_it_is_there(name, tmp_path):
    (line,) = fetch.by_hand(name, tmp_path)
    path = Path(line.rpartition("put it at ")[2])
    dataset = datasets.DATASETS[name]
    assert path == tmp_path / dataset.folders[0] / dataset.layouts["coop"].needs[0]
    path.parent.mkdir()
    path.touch()
    assert fetch.by_hand(name, tmp_path) == []


def test_a_split_is_to_be_put_where_it_is_read(tmp_path):
    """So beside the images, also where these are in another folder than downloads go to."""
    for i in range(10):
        path = tmp_path / f"caltech101/101_ObjectCategories/ant/image_{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert datasets.find("caltech101", tmp_path)[1] == "folders"
    (line,) = fetch.by_hand("caltech101", tmp_path)
    path = Path(line.rpartition("put it at ")[2])
    assert path == tmp_path / "caltech101/split_zhou_Caltech101.json"
    path.touch()
    assert datasets.find("caltech101", tmp_path)[1] == "coop"
    assert fetch.by_hand("caltech101", tmp_path) == []


def test_every_set_has_a_source_and_terms_of_use():
    assert all(dataset.files for dataset in datasets.DATASETS.values())
    assert all(
        fetch.terms(name).rpartition("See ")[2].startswith("https://") for name in datasets.DATASETS
    )
    for call in (
        fetch.terms,
        lambda name: fetch.by_hand(name, Path()),
        lambda name: fetch.fetch(name, Path()),
    ):
        with pytest.raises(ValueError, match="'flowers' is none of"):
            call("flowers")


def test_addresses_and_checksums_are_those_of_torchvision():
    prefix = tv.Flowers102._download_url_prefix
    theirs = {prefix + name: md5 for name, md5 in tv.Flowers102._file_dict.values()} | dict(
        tv.OxfordIIITPet._RESOURCES
    )
    theirs |= {tv.Food101._URL: tv.Food101._MD5, tv.DTD._URL: tv.DTD._MD5}
    theirs |= {c.url: c.tgz_md5 for c in (tv.CIFAR10, tv.CIFAR100)}
    known = [d for name, d in datasets.DATASETS.items() if name != "eurosat"]  # within a function
    ours = {f.url: f.md5 for dataset in known for f in dataset.files if f.md5}
    (caltech,) = ours.keys() - theirs.keys()  # torchvision has it inside a function
    text = Path(tv.caltech.__file__).read_text()
    assert caltech in text and ours.pop(caltech) in text and ours == theirs


def test_two_fetches_at_a_time_take_turns(tmp_path):
    second = threading.Thread(target=fetch.fetch, args=("office_caltech10", tmp_path))
    with files.file_lock(tmp_path / ".office_caltech10.lock"):
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join(20)
    assert not second.is_alive()
