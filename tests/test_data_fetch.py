"""Fetching from a server on the loopback that can cut connections, ignore ranges, and send the wrong bytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgekd.data import list_splits, read_dataset
from edgekd.data.fetch import DATASETS, RemoteFile, fetch
from edgekd.errors import DataError
from tests.data_layouts import make_coco, make_voc

DOG = [("dog", (1, 1, 9, 9))]


class Server(ThreadingHTTPServer):
    """Serves `files`; `cuts` are byte counts after which the next answers break off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.ranges = True
        self.seen: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def offer(self, name: str, data: bytes, md5: str | None = None) -> RemoteFile:
        self.files[name] = data
        return RemoteFile(self.url(name), md5 or hashlib.md5(data).hexdigest(), len(data))


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.server.seen.append((name, wanted))
        if name not in self.server.files:
            self.send_error(404)
            return
        data, start = self.server.files[name], 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if self.server.cuts:
            body = body[: self.server.cuts.pop(0)]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def tar_of(folder: Path, prefix: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=prefix or ".")
    return buffer.getvalue()


def zip_of(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.rglob("*")):
            packed.write(path, path.relative_to(folder))
    return buffer.getvalue()


def get(name: str, out: Path, *files: RemoteFile, **options: object) -> Path:
    return fetch(name, out, datasets={name: files}, wait_s=0.0, **options)


def test_voc_and_coco_can_be_read_when_fetched(server: Server, tmp_path: Path) -> None:
    make_voc(tmp_path / "a" / "VOCdevkit" / "VOC2007", {"trainval": {"a": DOG}})
    make_voc(tmp_path / "b" / "VOCdevkit" / "VOC2007", {"test": {"b": DOG}})
    files = [server.offer(f"{half}.tar", tar_of(tmp_path / half)) for half in "ab"]
    steps: list[tuple[str, int, int]] = []
    root = get("voc2007", tmp_path / "voc", *files, progress=lambda *step: steps.append(step))
    assert list_splits(root) == ("test", "trainval")
    assert len(read_dataset(root, "test")) == 1
    assert {name for name, _, _ in steps} >= {"a.tar", "a.tar: unpacking", "a.tar: checksum"}
    assert all(0 < done <= total for _, done, total in steps)

    make_coco(tmp_path / "c", {"val2017": {"a": DOG}}, {"dog": 1})
    root = get("coco2017", tmp_path / "coco", server.offer("val.zip", zip_of(tmp_path / "c")))
    assert len(read_dataset(root, "val2017")) == 1


def test_a_cut_connection_is_resumed_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    make_voc(tmp_path / "a", {"train": {"a": DOG}})
    file = server.offer("a.tar", tar_of(tmp_path / "a"))
    server.cuts = [1000, 2000, 0, 0, 500]
    get("x", tmp_path / "out", file, attempts=3)
    assert [wanted for _, wanted in server.seen] == [None, *(f"bytes={n}-" for n in (1000, 3000, 3000, 3000, 3500))]
    assert (tmp_path / "out" / "downloads" / "a.tar").read_bytes() == server.files["a.tar"]
    assert list_splits(tmp_path / "out") == ("train",)


def test_another_run_goes_on_with_what_one_has_left(server: Server, tmp_path: Path) -> None:
    make_voc(tmp_path / "a", {"train": {"a": DOG}})
    file = server.offer("a.tar", tar_of(tmp_path / "a"))
    server.cuts = [5000, 0, 0]
    with pytest.raises(DataError, match="cannot be downloaded"):
        get("x", tmp_path / "out", file, attempts=2)
    assert (tmp_path / "out" / "downloads" / "a.tar.part").stat().st_size == 5000
    get("x", tmp_path / "out", file)
    assert server.seen[-1][1] == "bytes=5000-"


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    make_voc(tmp_path / "a", {"train": {"a": DOG}})
    file = server.offer("a.tar", tar_of(tmp_path / "a"))
    server.cuts, server.ranges = [5000], False
    get("x", tmp_path / "out", file)
    assert (tmp_path / "out" / "downloads" / "a.tar").read_bytes() == server.files["a.tar"]


@pytest.mark.parametrize("left", ["whole", "too much", "garbage"])
def test_what_lies_there_is_judged_by_its_checksum(server: Server, tmp_path: Path, left: str) -> None:
    make_voc(tmp_path / "a", {"train": {"a": DOG}})
    file = server.offer("a.tar", tar_of(tmp_path / "a"))
    part = tmp_path / "out" / "downloads" / "a.tar.part"
    part.parent.mkdir(parents=True)
    data = server.files["a.tar"]
    part.write_bytes({"whole": data, "too much": data + b"x", "garbage": b"x" * 100}[left])
    get("x", tmp_path / "out", file)
    assert not part.exists()
    assert list_splits(tmp_path / "out") == ("train",)


def test_wrong_bytes_are_refused_after_a_second_try(server: Server, tmp_path: Path) -> None:
    file = server.offer("a.tar", b"not what was promised", md5="0" * 32)
    with pytest.raises(DataError, match=r"does not give(.|\n)*got: +md5(.|\n)*expected: +md5 0{32}"):
        get("x", tmp_path / "out", file)
    assert len(server.seen) == 2
    assert list((tmp_path / "out" / "downloads").iterdir()) == []


def test_without_a_network_the_files_and_their_place_are_told(tmp_path: Path) -> None:
    with Server() as gone:
        url = gone.url("a.tar")
    files = (RemoteFile(url, "1" * 32), RemoteFile(url.replace("a.tar", "b.tar"), "2" * 32))
    with pytest.raises(DataError) as caught:
        get("x", tmp_path / "out", *files, attempts=2)
    text = str(caught.value)
    for words in (str(tmp_path / "out" / "downloads"), url, "1" * 32, "b.tar", "2" * 32):
        assert words in text


def test_a_file_that_the_server_does_not_have_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="404"):
        get("x", tmp_path / "out", RemoteFile(server.url("none.tar"), "0" * 32))
    assert len(server.seen) == 1


def test_files_put_there_by_hand_are_taken_or_refused_but_kept(server: Server, tmp_path: Path) -> None:
    make_voc(tmp_path / "a", {"train": {"a": DOG}})
    file = server.offer("a.tar", tar_of(tmp_path / "a"))
    path = tmp_path / "out" / "downloads" / "a.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut off")
    with pytest.raises(DataError, match="wrong checksum"):
        get("x", tmp_path / "out", file)
    assert path.read_bytes() == b"cut off"
    path.write_bytes(server.files["a.tar"])
    get("x", tmp_path / "out", file)
    assert server.seen == []
    path.unlink()  # no longer needed, once unpacked
    get("x", tmp_path / "out", file)
    assert server.seen == []


def hostile_tar(member: tarfile.TarInfo, content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member.size = len(content) if member.isreg() else 0
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def hostile_zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr(zipfile.ZipInfo(name), "x")  # the same bytes at any time: they are in a test's name
    return buffer.getvalue()


def link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("way-out")
    member.type, member.linkname = kind, "/etc"
    return member


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tar", hostile_tar(tarfile.TarInfo("../evil"))),
        ("a.tar", hostile_tar(tarfile.TarInfo("VOCdevkit/../../evil"))),
        ("a.tar", hostile_tar(tarfile.TarInfo("/tmp/evil-edgekd"))),
        ("a.tar", hostile_tar(link(tarfile.SYMTYPE))),
        ("a.tar", hostile_tar(link(tarfile.LNKTYPE))),
        ("a.tar", hostile_tar(link(tarfile.CHRTYPE))),
        ("a.zip", hostile_zip("../evil")),
        ("a.zip", hostile_zip("..\\evil")),
        ("a.zip", hostile_zip("C:/evil")),
        ("a.tar", b"no archive at all"),
        ("a.zip", hostile_zip("x" * 50)[:60]),
    ],
)
def test_hostile_and_broken_archives(server: Server, tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(DataError, match=r"leads out|no regular file|cannot be unpacked"):
        get("x", tmp_path / "deep" / "out", server.offer(name, data))
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert not list((tmp_path / "deep" / "out" / "downloads").glob("*.unpacked"))


def test_a_full_disk_is_told_beforehand(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too little room"):
        get("x", tmp_path / "out", RemoteFile(server.url("a.tar"), "0" * 32, 10**18))
    assert server.seen == []


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="voc2007, voc2012, coco2017"):
        fetch("imagenet", tmp_path)
    for files in DATASETS.values():
        for file in files:
            assert file.url.startswith("http")
            assert len(file.md5) == 32
            assert file.size_bytes > 10**8
