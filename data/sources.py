"""Records of local files, folders and hub data sets, each with its position for error messages.

Local files are read here and not by `datasets`, whose loaders do not say which line of a file is broken. Hub
ids and directories of `save_to_disk` are read by `datasets`. Only the current file is held in memory; of JSON
lines, CSV and Parquet, only the current part.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.splits import training_files

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# Of a data set on the hub, not data: FILES_TO_IGNORE of `datasets.data_files`.
NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
SAVED_TO_DISK = ("state.json", "dataset_dict.json")  # one of them is in a directory of save_to_disk
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # name, or owner/name


class BadRecord(ValueError):
    """A record that cannot be used; its message has the position, the problem and what was expected."""


def in_one_line(error: Exception) -> str:
    """The message of a library's error, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


Located = tuple[str, object]  # (position, record), or (position, BadRecord) for one that cannot be used


class Source:
    """A data set by its name: a file, a folder of files, a directory of `save_to_disk`, or a hub id.

    Iterating yields (position, record). A record that is broken is a BadRecord, and so is the rest of a file
    that cannot be read further. Of a data set that has splits, only train is read, and `note` says what was
    left out ("": nothing). `streaming` reads a hub data set without storing it. Raises ValueError where no
    data set of that name can be read.
    """

    def __init__(self, name: str, streaming: bool = False):
        self.name, self.note, self._hub, self._files = name, "", None, []
        path = Path(name)
        is_hub_id = HUB_ID.fullmatch(name) and not name.lower().endswith(SUFFIXES)
        if os.path.isdir(name) and any((path / file).is_file() for file in SAVED_TO_DISK):
            self._hub, self.note = _from_disk(path)
        elif os.path.isdir(name):
            self._files, self.note = training_files(path, _files_in(name))
        elif os.path.exists(name) or not is_hub_id:
            _check_file(name)
            self._files = [path]
        else:
            self._hub, self.note = _from_hub(name, streaming)
        for file in self._files:
            if not os.access(file, os.R_OK):
                raise ValueError(f"--dataset {file}: permission denied; a readable file was expected")

    def fingerprint(self) -> str:
        """A hash that changes with the contents.

        It covers the bytes of local files; for a hub data set it is what `datasets` knows of its version.
        """
        digest = hashlib.sha256()
        if self._hub is not None:
            version = self._hub._fingerprint if hasattr(self._hub, "_fingerprint") else self._hub.info
            digest.update(str(version).encode())
        for file in self._files:
            digest.update(file.suffix.lower().encode())
            digest.update(_file_digest(file))
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Located]:
        if self._hub is not None:
            number = -1
            try:
                for number, record in enumerate(self._hub):
                    yield f"{self.name} row {number}", record
            except Exception as error:  # errors of the network, or of decoding a row
                where = f"{self.name} row {number + 1}"
                yield (
                    where,
                    BadRecord(f"{where}: {in_one_line(error)}; this row and what follows cannot be read"),
                )
        for file in self._files:
            try:
                yield from READERS[file.suffix.lower()](file)
            except BadRecord as error:
                yield str(file), BadRecord(f"{error}; what follows in the file cannot be read")


def _files_in(name: str) -> list[Path]:
    """The data files in a folder, at any depth, but not in hidden folders; raises ValueError for none."""
    folder = Path(name)
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.name not in NO_DATA
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"--dataset {name}: the folder has no file that ends in {', '.join(SUFFIXES)}")
    return files


def _check_file(name: str) -> None:
    """Raise ValueError where `name` is no file of a known kind."""
    if not os.path.exists(name):
        raise ValueError(f"--dataset {name}: no such file; a file, a folder or a hub id was expected")
    if not os.path.isfile(name):
        raise ValueError(f"--dataset {name}: neither a file nor a folder")
    if Path(name).suffix.lower() not in SUFFIXES:
        raise ValueError(f"--dataset {name}: a file that ends in {', '.join(SUFFIXES)} was expected")


def _file_digest(file: Path) -> bytes:
    """The SHA-256 of a file."""
    with open(file, "rb") as stream:
        if hasattr(hashlib, "file_digest"):  # Python 3.11: does not read the whole file at once
            return hashlib.file_digest(stream, "sha256").digest()
        return hashlib.sha256(stream.read()).digest()


def _from_hub(name: str, streaming: bool):
    """(the split `train` of a hub data set, a note on its other splits)."""
    from datasets import load_dataset
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # it would warn of each attempt
    try:
        loaded = load_dataset(name, split="train", streaming=streaming)
    except Exception as error:  # the hub's errors share no base class
        reason = in_one_line(error) or type(error).__name__
        raise ValueError(
            f"--dataset {name}: neither a file nor a reachable hub data set has that name: {reason}"
        ) from None
    return loaded, _note_on_splits(loaded.info.splits or ())


def _from_disk(path: Path):
    """(the data set, or its split `train`, that was saved by save_to_disk, a note on its other splits)."""
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # the errors of damaged directories share no base class either
        raise ValueError(f"--dataset {path}: {in_one_line(error)}") from None
    if isinstance(loaded, DatasetDict):
        if "train" not in loaded:
            raise ValueError(
                f"--dataset {path} has the splits {', '.join(loaded)}: a split named train was expected"
            )
        return loaded["train"], _note_on_splits(loaded)
    return loaded, ""


def _note_on_splits(splits: Iterable[str]) -> str:
    """A line on the splits that are not read, "" where train is the only one."""
    others = [split for split in splits if split != "train"]
    return f"its split train is read; left out: {', '.join(others)}" if others else ""


def _lines(file: Path, blank: bool = False) -> Iterator[Located]:
    """(position, text) of each line; a BadRecord for one that is no UTF-8. Blank lines only with `blank`."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if blank or line.strip():
                try:
                    yield f"{file}:{number}", line.decode("utf-8")
                except UnicodeDecodeError as error:
                    problem = f"invalid UTF-8 at byte {error.start} of the line; UTF-8 was expected"
                    yield f"{file}:{number}", BadRecord(f"{file}:{number}: {problem}")


def _text(file: Path) -> str:
    """The whole file; raises BadRecord where it is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{file}: invalid UTF-8 at byte {error.start}; UTF-8 was expected") from None


def _read_jsonl(file: Path) -> Iterator[Located]:
    """An object in each line."""
    for where, line in _lines(file):
        if not isinstance(line, BadRecord):
            try:
                line = json.loads(line)
            except (ValueError, RecursionError) as error:
                line = BadRecord(f"{where}: invalid JSON ({error}); one object per line was expected")
        yield where, line


def _read_json(file: Path) -> Iterator[Located]:
    """An array of objects; or an object in each line, as many files of that name have it."""
    with open(file, "rb") as stream:
        first = stream.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first != b"[":
        yield from _read_jsonl(file)
        return
    text = _text(file)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{file}: invalid JSON ({error}); an array of objects was expected") from None
    for number, record in enumerate(records):
        yield f"{file} element {number}", record


def _read_csv(file: Path) -> Iterator[Located]:
    """Rows under a header with the names of the fields."""

    def lines():
        for _, line in _lines(file, blank=True):
            if isinstance(line, BadRecord):
                raise line
            yield line

    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(lines(), strict=True)
    try:
        if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
            raise BadRecord(
                f"{file}:1: two columns of one name ({', '.join(reader.fieldnames)}); each needs its own"
            )
        for record in reader:
            where = f"{file}:{reader.line_num}"
            # DictReader keeps surplus values under the key None, and gives missing ones the value None.
            if None in record or None in record.values():
                surplus, missing = len(record.get(None) or ()), list(record.values()).count(None)
                fields = len(record) - (None in record) + surplus - missing
                problem = f"{fields} fields; {len(reader.fieldnames)} were expected, as in the header"
                yield where, BadRecord(f"{where}: {problem}")
            else:
                yield where, record
    except csv.Error as error:
        raise BadRecord(f"{file}:{reader.reader.line_num}: invalid CSV ({error})") from None


def _read_parquet(file: Path) -> Iterator[Located]:
    """The rows of all row groups."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(1000):
            for record in batch.to_pylist():
                yield f"{file} row {number}", record
                number += 1
    # The last two: values that Python cannot hold.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadRecord(f"{file}: invalid Parquet ({in_one_line(error)})") from None


def _read_text(file: Path) -> Iterator[Located]:
    """The whole file as one document."""
    yield str(file), {"text": _text(file)}


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
