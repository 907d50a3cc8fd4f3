"""Files of data: finds them, reads and unpacks them within bounds, checks and downloads them.

They are looked for in the folders of NANOLAB_DATA, then in data/downloads/, where downloads go.
"""
import bz2
import glob
import gzip
import hashlib
import http.client
import lzma
import os
import stat
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanolab.run import lock_file, replacing
from nanolab.settings import UserError

DOWNLOADS = Path(__file__).resolve().parent / "downloads"
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zip": zipfile.ZipFile}
AT_ONCE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe too, which nobody writes to
UNPACKED, FEW, RATIO = 2 ** 32, 2 ** 28, 300  # bytes that an archive may unpack to; above FEW, for each packed one


# --- Finding and reading ---

def named():
    """The folders that NANOLAB_DATA names, in order."""
    return [Path(name).expanduser() for name in os.environ.get("NANOLAB_DATA", "").split(os.pathsep) if name]


def folders():
    """The folders of NANOLAB_DATA, all of which must be there, then data/downloads/."""
    for folder in named():
        if not folder.is_dir():
            raise UserError(f"NANOLAB_DATA names {folder}, which is not a folder")
    return [*named(), DOWNLOADS]


def find(file):
    """The first `file`, raw or packed, in the folders; None where there is none."""
    paths = (folder / (file + suffix) for folder in folders() for suffix in ("", *OPENERS))
    return next((path for path in paths if path.is_file()), None)


def read(path, max_bytes=None):
    """uint8 tensor of a file's bytes: raw ones memory-mapped, of packed ones the first max_bytes, in memory."""
    try:
        if path.suffix.lower() in OPENERS:
            content = bytearray(unpack(path, max_bytes))  # a bytearray, because torch wants writable memory
        else:  # "c", copy on write: writable too, and still the file cannot be changed through it
            content = np.memmap(path, dtype=np.uint8, mode="c") if path.stat().st_size else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not len(content):
        raise UserError(f"{path} is empty")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8))


def existing(name):
    """The path of the file or folder that a person named: as it stands, else in one of the folders; or None."""
    path = Path(name).expanduser()
    if not name or path.exists():
        return path if name else None
    return next((folder / path for folder in folders() if (folder / path).exists()), None)


def listed(name):
    """The files that a folder, with all below it, or a glob means: their paths as texts, sorted; hidden ones and links
    to folders are left out. None: `name` is neither. UserError: there is none, or a folder that cannot be read."""
    def unreadable(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    path, found = existing(name), []
    if path is not None and path.is_dir():
        for folder, folders, names in os.walk(path, onerror=unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    elif path is None and glob.has_magic(name):
        found = [file for file in glob.glob(os.path.expanduser(name), recursive=True) if not os.path.isdir(file)]
    else:
        return None
    if not found:
        raise UserError(f"{name}: there is no file")
    return sorted(found)


def content(path, max_bytes=None):
    """The (first max_bytes) bytes of a file, raw or packed, whose path is a text; quick, for one of very many."""
    if path.lower().endswith(tuple(OPENERS)):
        return bytes(unpack(Path(path), max_bytes))
    try:
        with open(os.open(path, AT_ONCE), "rb", buffering=0 if max_bytes is None else -1) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path} is no file")
            return file.read() if max_bytes is None else file.read(max_bytes)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def unpack(path, max_bytes=None, suffix=None):
    """The (first max_bytes) bytes in a .gz, .xz, .bz2 or .zip file."""
    try:
        with OPENERS[suffix or path.suffix.lower()](path) as archive:
            if not isinstance(archive, zipfile.ZipFile):
                return read_bounded(archive, path, max_bytes)
            members = [name for name in archive.namelist() if not name.endswith("/")
                       and not name.startswith("__MACOSX/")]     # what macOS knows of the files
            if len(members) != 1:
                listed = ", ".join(members[:8]) + (", ..." if len(members) > 8 else "")
                raise UserError(f"{path} has {len(members)} members ({listed}): unpack it and name one file")
            with archive.open(members[0]) as file:
                return read_bounded(file, path, max_bytes)
    except PermissionError:
        raise
    except (OSError, EOFError, RuntimeError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or not what its name says ({error}): fetch it again") from error


def most_unpacked(path):
    """How many bytes the archive at `path` may unpack to."""
    return min(UNPACKED, max(FEW, RATIO * path.stat().st_size))


def read_bounded(file, path, max_bytes=None):
    """The (first max_bytes) bytes of an open member of the archive at `path`, read piece by piece.

    Raises UserError where there are more than `most_unpacked`."""
    content, most = bytearray(), most_unpacked(path)
    while piece := file.read(min(2 ** 20, most + 1 if max_bytes is None else max_bytes - len(content))):
        content += piece
        if len(content) > most:
            raise UserError(f"{path} unpacks to more than {most:,} bytes, which is refused: unpack it, or take its "
                            "beginning by --max_bytes")
    return content


# --- Checking and downloading ---

def difference(content, size, blob_id):
    """What is wrong with a bytes-like object that should have this size and this git blob id; "" if nothing."""
    if len(content) != size:
        return f"it has {len(content):,} bytes, not {size:,}"
    digest = hashlib.sha1(b"blob %d\0" % size)
    digest.update(content)
    return "" if digest.hexdigest() == blob_id else f"its git blob id is {digest.hexdigest()}, not {blob_id}"


def verified(path, file, size, blob_id):
    """path, its content checked; a large file's success is remembered, so that not every start hashes it."""
    stat, marker = path.stat(), DOWNLOADS / f"{file}.checked"
    stamp = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {blob_id}"
    if marker.is_file() and marker.read_bytes() == stamp.encode():
        return path
    if wrong := difference(read(path).numpy(), size, blob_id):
        raise UserError(f"{path} is not {file}: {wrong}; replace or remove it")
    if size > 2 ** 24:
        try:
            DOWNLOADS.mkdir(exist_ok=True)
            marker.write_text(stamp, encoding="utf-8")
        except OSError:
            pass  # a read-only installation: the next start hashes again
    return path


def download(url, path, size, blob_id):
    """Downloads a file of known content to `path`, unpacking a .zip. Returns path: complete and checked, or not there.

    size: bytes of the content. blob_id: its git blob id. Raises UserError as `fetched` does.
    """
    def checked(part):
        try:
            content = unpack(part, suffix=".zip") if url.endswith(".zip") else part.read_bytes()
        except UserError as error:
            raise ValueError(error) from error
        if wrong := difference(content, size, blob_id):
            raise ValueError(wrong)
        with replacing(path) as file:
            file.write(content)
    return fetched(url, Path(path), checked)


def fetched(url, path, finish, part=None):
    """path, complete, where `finish(part)` makes it of what url sent; not asked for where it is there.

    finish raises ValueError, or what reading an archive may raise, where something else came, which is then removed.
    What came before a download broke off stays in `part` (None: beside path), and the next call goes on there.
    Raises UserError: no connection, refused, broken off, other content than expected, folder not writable or full.
    """
    part = part or path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part.with_suffix(".lock"), "w") as lock:
            lock_file(lock, wait=True)  # of two runs that start together the second waits and finds the file
            if path.exists():
                return path
            fetch(url, part)
            try:
                finish(part)
            except (ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
                part.unlink()
                raise UserError(f"what {url} sent is not {path.name} and was removed: {error}") from error
            part.unlink(missing_ok=True)
            return path
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def fetch(url, part):
    """Brings url's bytes into the file part, from where an earlier attempt broke off."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:
            raise UserError(f"{url} answers {error.code} {error.reason}") from error
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # nothing is missing: the earlier attempt ended between the last byte and the check
        part.unlink()  # longer than the file, so of another one
        return fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"no connection to {url} ({getattr(error, 'reason', error)})") from error
    with response:
        have = have if response.status == 206 else 0  # 200: the server sends everything again
        length, broken = response.headers.get("Content-Length"), None
        total = None if length is None else have + int(length)
        print(f"downloading {url}" + (f", going on at byte {have:,}" if have else ""), flush=True)
        with open(part, "ab" if have else "wb") as file, \
                tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            while broken is None:
                try:
                    chunk = response.read(2 ** 16)
                except (OSError, http.client.HTTPException) as error:
                    broken, chunk = error, b""
                if not chunk:
                    break
                file.write(chunk)
                bar.update(len(chunk))
            have = file.tell()
    if broken is not None or (total is not None and have < total):
        raise UserError(f"the download of {url} broke off after {have:,} bytes: the same command goes on from there")
