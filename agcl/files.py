"""Files that a crash leaves whole: the old content or the new one, never a part of either."""

import errno
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from agcl.errors import AgclError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a file that there is no room for, or no leave to make so large."""
MAKE_ROOM = "make room there"


def partial_of(path: Path) -> Path:
    """Where a file is written before it gets its name: in the same folder, since a name cannot move across disks.

    It depends on the file's name alone, so that what a killed process left is written over by the next one.
    """
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when it is complete and on the disk.

    The folder is made if missing. Only one process may write ``path`` at a time.

    Raises:
        OSError: With the name of ``path``, if it cannot be written, for instance on a full disk. What was there before
            is left, and nothing else.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with synced(partial, path) as file:
            yield file
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder to make and to fill, which takes the place of ``path`` when it is complete and on the disk.

    Only one process may write ``path`` at a time. What was there before is left if this is not completed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        sync_tree(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def synced(path: Path, named: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is on the disk when this is left; its errors name ``named``.

    The operating system says of a full disk only that it is full.
    """
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(named)) from error


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file by way of :func:`replacing`; text as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def check_writable(path: str | Path) -> None:
    """Before anything long: see whether a file, whose folder need not exist yet, could be written.

    Raises:
        AgclError: If not.
    """
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AgclError(f"{path} cannot be written ({error.strerror}: {folder}); choose another folder.") from error


def sync_folder(folder: Path) -> None:
    """Let no later change of names reach the disk before the earlier ones."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until all files below a folder, written by somebody else, are on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def is_whole_zip(path: Path) -> bool:
    """Whether a zip archive, which is what ``torch.save`` writes, has all its bytes, by their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, ValueError):
        return False
