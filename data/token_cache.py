"""The directory of tokens that were made once: entries that several users and runs share, checked when used.

An entry is a directory with files and a meta.json. While it is written, its name is <entry>.<8 letters>, and
LOCK in it is locked by the process that writes. It gets its own name when it is complete. meta.json has
"files", {name: [bytes, checksum]} of the others, and "checksum", of itself without that. Checksums are
128-bit XXH3 hashes in hexadecimal.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

META, LOCK = "meta.json", "lock"
PARTIAL = re.compile(r"[0-9a-f]{32}\.[0-9a-z_]{8}")
OLD_SECONDS = 24 * 3600  # a partial entry that nothing was written to for so long is a dead run's
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # errors where another user or mount says no
CHUNK_BYTES = 16 * 2**20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # names this kernel, whose locks are certain


class Maker:
    """Who makes an entry that several processes need. This is a process that needs no other one;
    trainer/start/tokens.py has one that asks the others."""

    def begins(self, partial: Path) -> None:
        """This process begins to make the entry, in the directory `partial` beside it."""

    def made_by_another(self) -> Path | None:
        """The entry that another process makes in a directory that this one sees, for which it waits; None
        where there is none, and this process has to make it."""
        return None


ALONE = Maker()


def entry_of(partial: Path) -> Path:
    """The name that the directory of an entry which is being made will get."""
    return partial.with_name(partial.name.partition(".")[0])


def cache_directory(chosen: str | None) -> Path:
    """The directory `chosen` (--data_cache_dir); default: markstep/tokens in the user's cache.

    What killed runs left there unfinished is removed. Where the user's cache cannot be written, it is a
    temporary directory; `chosen` may be one that can only be read. Raises ValueError where `chosen` cannot be
    used at all.
    """
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(chosen or Path(user) / "markstep" / "tokens")
    try:
        if not chosen and user.startswith("~"):  # a user without a home
            raise FileNotFoundError
        directory.mkdir(parents=True, exist_ok=True)
        remove_dead(directory)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        if chosen and error.errno in NOT_OURS and os.access(directory, os.R_OK | os.X_OK):
            return directory
        if chosen:
            raise ValueError(f"--data_cache_dir {chosen} cannot be written: {error.strerror}") from None
        return Path(tempfile.mkdtemp(prefix="markstep-tokens-"))


def places(cache: Path) -> Iterator[Path]:
    """The directory `cache`, and those to turn to where it is another user's: one's own, a temporary one."""
    yield cache
    if (own := cache_directory(None)) != cache:
        yield own
    yield Path(tempfile.mkdtemp(prefix="markstep-tokens-"))


def read_entry(entry: Path, checked: bool = False) -> dict:
    """The contents of an entry's meta.json, after all files were compared with it.

    Where another process has just `checked` their bytes, only their sizes are. Raises ValueError where the
    entry is damaged, and OSError where it cannot be read.
    """
    try:
        meta = json.loads((entry / META).read_text(encoding="utf-8"))
        if meta.pop("checksum") != _meta_checksum(meta):
            raise ValueError(f"{META} is not what was written")
        files = meta["files"].items()
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{META} is not what was written") from None
    for name, described in files:
        size = (entry / name).stat().st_size
        if size != described[0] if checked else _describe(entry / name) != described:
            raise ValueError(f"{name} is not what was written")
    return meta


def write_entry(entry: Path, write: Callable[[Path], dict], maker: Maker = ALONE) -> None:
    """Make an entry: `write(directory)` writes its files and returns the contents of meta.json.

    `maker` is told of the directory in which the entry is made, before that begins. Nothing is left where
    `write` raises. Permissions are those that the directory and the umask give.
    """
    partial = _reserve(entry)
    partial.mkdir()
    try:
        lock = _lock(partial)
        try:
            maker.begins(partial)
            meta = write(partial)
            files = [path for path in sorted(partial.iterdir()) if path.name != LOCK]
            meta |= {"files": {path.name: _describe(path) for path in files}}
            meta |= {"checksum": _meta_checksum(meta)}
            (partial / META).write_text(json.dumps(meta), encoding="utf-8")
            (partial / LOCK).unlink()
            _publish(partial, entry)
        finally:
            os.close(lock)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_dead(cache: Path) -> None:
    """Remove the partial entries of processes that have surely ended."""
    for path in cache.iterdir():
        if PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _remove_if_dead(path)


def warn(text: str) -> None:
    """Say on stderr what is not as it should be, and what is done about it."""
    print(f"warning: {text}", file=sys.stderr)


def _remove_if_dead(partial: Path) -> None:
    """Remove it where no process has locked it, and it is of this kernel, or has not changed for a day."""
    try:
        old = time.time() - max(path.stat().st_mtime for path in (partial, *partial.iterdir())) > OLD_SECONDS
        if not (partial / LOCK).exists():
            if old:
                shutil.rmtree(partial, ignore_errors=True)
            return
        lock = os.open(partial / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if old or os.read(lock, 100) == _boot_id() != b"":
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)
    except OSError:  # it is being written, has gone meanwhile, or is another user's
        return


def _lock(partial: Path) -> int:
    """Lock a partial entry for as long as this process lives; returns the lock's descriptor.

    The kernel's name is written after that, so that an unlocked file with it is a dead process's.
    """
    lock = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, _boot_id())
    except OSError:  # a file system without locks: its partial entries are dead when they are old
        pass
    return lock


def _boot_id() -> bytes:
    """The name of the running kernel, b"" where it has none."""
    try:
        return BOOT_ID.read_bytes()
    except OSError:
        return b""


def _publish(partial: Path, entry: Path) -> None:
    """Give a complete entry its name; a damaged entry of that name is deleted."""
    try:
        os.rename(partial, entry)
        return
    except OSError:
        if not os.path.lexists(entry):
            raise
    try:
        read_entry(entry)  # another run made the same entry meanwhile
        shutil.rmtree(partial)
    except (ValueError, FileNotFoundError, NotADirectoryError):
        damaged = _reserve(entry)
        os.rename(entry, damaged)
        os.rename(partial, entry)
        damaged.unlink() if not damaged.is_dir() else shutil.rmtree(damaged, ignore_errors=True)


def _reserve(entry: Path) -> Path:
    """A new name beside an entry."""
    return entry.with_name(f"{entry.name}.{secrets.token_hex(4)}")


def _describe(file: Path) -> list:
    """[bytes, checksum] of a file."""
    digest, size = xxhash.xxh3_128(), 0
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]


def _meta_checksum(meta: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())
