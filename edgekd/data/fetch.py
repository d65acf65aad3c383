"""The public data sets from their official places: resumed, verified, unpacked, and by hand where there is no network.

Archives lie in OUT/downloads under their official names, also those that someone puts there by hand. They are kept;
delete them once the data set is unpacked if the space is needed.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from edgekd import __version__
from edgekd.artifact import atomic_path, write_text
from edgekd.data.problems import printable
from edgekd.errors import DataError, refusal

_BLOCK = 1 << 20
_TIMEOUT_S = 30.0

Progress = Callable[[str, int, int], None]
"""Called with (file name, bytes done, bytes in all or 0) now and then."""


@dataclass(frozen=True)
class RemoteFile:
    """One archive: where it is, and what it must be.

    Attributes:
        size_bytes: for progress and the check of free space; the MD5 decides whether the file is right.
    """

    url: str
    md5: str
    size_bytes: int = 0

    @property
    def name(self) -> str:
        """File name of the archive."""
        return self.url.rsplit("/", 1)[-1]


_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_COCO = "http://images.cocodataset.org"

DATASETS: dict[str, tuple[RemoteFile, ...]] = {
    "voc2007": (
        RemoteFile(f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64", 460_032_000),
        RemoteFile(f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f", 451_020_800),
    ),
    "voc2012": (
        RemoteFile(f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd", 1_999_639_040),
    ),
    "coco2017": (
        RemoteFile(
            f"{_COCO}/annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", 252_907_541
        ),
        RemoteFile(f"{_COCO}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", 815_585_330),
        RemoteFile(f"{_COCO}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_336_861_798),
    ),
}


def fetch(
    name: str,
    out: Path | str,
    *,
    datasets: Mapping[str, tuple[RemoteFile, ...]] = DATASETS,
    progress: Progress | None = None,
    attempts: int = 5,
    wait_s: float = 1.0,
) -> Path:
    """Download, verify and unpack a data set into `out`; returns `out`, which `read_dataset` takes.

    What is there already, whole or in part, is used: a download goes on where it was cut off, and archives put into
    OUT/downloads by hand are taken. After `attempts` that gain nothing, the first two `wait_s` seconds apart, then
    doubling, it gives up.

    Raises:
        DataError: the name is unknown, the network is not there (the message says which files to put where), a
            file has the wrong checksum, an archive is damaged, or the disk is too full.
        EdgeKDError: files cannot be written.
    """
    out = Path(out)
    if name not in datasets:
        raise DataError(f"unknown data set {name!r}", expected=", ".join(datasets))
    files = datasets[name]
    downloads = out / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        missing = [file for file in files if not _is_unpacked(downloads, file)]
        _check_space(out, downloads, missing)
        for file in missing:
            _obtain(file, files, downloads, progress, attempts, wait_s)
            _unpack(downloads / file.name, out, file, progress)
            write_text(_marker(downloads, file), file.md5 + "\n")
    except OSError as error:
        raise refusal(error, printable(out)) from error
    return out


def by_hand(files: tuple[RemoteFile, ...], downloads: Path) -> str:
    """What to download and where to put it, for machines without network."""
    lines = [f"download these files elsewhere and put them into {printable(downloads.resolve())}, then run this again:"]
    lines += [f"            {file.url}  (md5 {file.md5})" for file in files]
    return "\n".join(lines)


def _marker(downloads: Path, file: RemoteFile) -> Path:
    return downloads / f"{file.name}.unpacked"


def _is_unpacked(downloads: Path, file: RemoteFile) -> bool:
    marker = _marker(downloads, file)
    return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").strip() == file.md5


def _check_space(out: Path, downloads: Path, missing: list[RemoteFile]) -> None:
    """Room for each archive and, once more, its content."""
    names = [name for file in missing for name in (file.name, f"{file.name}.part")]
    there = sum((downloads / name).stat().st_size for name in names if (downloads / name).is_file())
    needed = 2 * sum(file.size_bytes for file in missing) - there
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"too little room for the data set in {printable(out)}",
            got=f"{free / 1e9:.1f} GB free",
            expected=f"about {needed / 1e9:.1f} GB, for archives and their content",
        )


def _obtain(
    file: RemoteFile,
    files: tuple[RemoteFile, ...],
    downloads: Path,
    progress: Progress | None,
    attempts: int,
    wait_s: float,
) -> None:
    """The verified archive in `downloads`, from there or from the network."""
    path, part = downloads / file.name, downloads / f"{file.name}.part"
    if path.is_file():
        found = _md5(path, progress)
        if found != file.md5:
            raise DataError(
                f"{printable(path)} has the wrong checksum",
                got=f"md5 {found}",
                expected=f"md5 {file.md5}",
                fix="it is incomplete or another file: remove it and run this again",
            )
        return
    failures, bad_md5 = 0, ""
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            _download(file, part, progress)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            gained = part.is_file() and part.stat().st_size > before
            failures = 0 if gained else failures + 1  # a large file may be cut off often, as long as it grows
            final = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)
            if failures >= attempts or final:
                raise _unreachable(file, files, downloads, error) from error
            time.sleep(wait_s * 2 ** max(0, failures - 1))
            continue
        found = _md5(part, progress)
        if found == file.md5:
            os.replace(part, path)
            return
        part.unlink()  # nothing in it can be trusted: once more from the start
        if bad_md5:
            raise DataError(
                f"{file.url} does not give the file that it should",
                got=f"md5 {found}",
                expected=f"md5 {file.md5}",
                fix=by_hand((file,), downloads),
            )
        bad_md5 = found


def _unreachable(file: RemoteFile, files: tuple[RemoteFile, ...], downloads: Path, error: Exception) -> DataError:
    return DataError(
        f"{file.url} cannot be downloaded",
        got=f"{type(error).__name__}: {error}",
        fix=by_hand(tuple(other for other in files if not (downloads / other.name).is_file()), downloads),
    )


def _download(file: RemoteFile, part: Path, progress: Progress | None) -> None:
    """Fetch the rest of the file behind what `part` holds.

    Raises:
        URLError, HTTPException, ConnectionError, TimeoutError: the connection failed or was cut.
    """
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": f"edgekd/{__version__}"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(file.url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing lies behind what is there; the checksum judges it
            return
        raise
    with response:
        resumed = response.status == 206 and _starts_at(response.headers.get("Content-Range"), have)
        if not resumed:
            have = 0
        length = int(response.headers.get("Content-Length") or 0)
        total = have + length if length else file.size_bytes
        with open(part, "ab" if resumed else "wb") as stream:
            while block := response.read(_BLOCK):
                stream.write(block)
                have += len(block)
                if progress:
                    progress(file.name, have, total)
    if length and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _starts_at(content_range: str | None, offset: int) -> bool:
    return content_range is not None and content_range.strip().startswith(f"bytes {offset}-")


def _md5(path: Path, progress: Progress | None) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    done, total = 0, path.stat().st_size
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            done += len(block)
            if progress:
                progress(f"{path.name.removesuffix('.part')}: checksum", done, total)
    return digest.hexdigest()


def _unpack(archive: Path, out: Path, file: RemoteFile, progress: Progress | None) -> None:
    """Write the archive's regular files below `out`; unpacking again overwrites with the same.

    Raises:
        DataError: it is damaged, or an entry leads out of `out` or is a link or a device.
    """
    done = 0
    try:
        for name, size, stream in _entries(archive):
            target = out / _inside(archive, name)
            with atomic_path(target) as temporary, open(temporary, "wb") as sink:
                shutil.copyfileobj(stream, sink, _BLOCK)
            done += size
            if progress:
                progress(f"{archive.name}: unpacking", done, max(done, file.size_bytes))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{printable(archive)} cannot be unpacked", got=f"{type(error).__name__}: {error}") from error


def _entries(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """(name, bytes, stream) of each regular file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    with packed.open(info) as stream:
                        yield info.filename, info.file_size, stream
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isdir():
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise DataError(f"{printable(archive)} holds {member.name!r}, which is no regular file")
            with content:
                yield member.name, member.size, content


def _inside(archive: Path, name: str) -> Path:
    """An entry's name as a path below the target.

    Raises:
        DataError: it leads elsewhere.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f"{printable(archive)} holds {name!r}, which leads out of the target folder")
    return Path(*path.parts)
