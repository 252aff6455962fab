"""Records of local files, folders and hub data sets, each with the place that an error message names.

Local files are read here, and not by `datasets`, whose loaders do not say in which line a file is broken; hub
ids and directories of `save_to_disk` go through it. Nothing is held but the file that is read (of JSON lines,
CSV and Parquet, its current part).
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # name, or owner/name


class BadRecord(ValueError):
    """A record that cannot be used; the message says where it is, what is wrong, and what was expected."""


def in_one_line(error: Exception) -> str:
    """What an error of a library says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


Located = tuple[str, object]  # where a record is, and the record, or a BadRecord in its place


class Source:
    """A data set by the name that a user gives: a file, a folder of files, a directory of `save_to_disk`, or
    a hub id.

    Iterating gives (where, record), with a BadRecord in place of one that is broken, or of the rest of a file
    that is. Raises ValueError where nothing of that name can be read. `streaming` reads a hub data set
    without storing it.
    """

    def __init__(self, name: str, streaming: bool = False):
        self.name, self._hub, self._files = name, None, []
        path = Path(name)
        is_hub_id = HUB_ID.fullmatch(name) and not name.lower().endswith(SUFFIXES)
        if os.path.isdir(name) and (
            (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        ):
            self._hub = _from_disk(path)
        elif os.path.isdir(name):
            self._files = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in SUFFIXES
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not self._files:
                raise ValueError(
                    f"--dataset {name}: the folder has no file that ends in {', '.join(SUFFIXES)}"
                )
        elif os.path.exists(name) or not is_hub_id:
            self._files = [path]
            if not os.path.exists(name):
                raise ValueError(f"--dataset {name}: no such file; a file, a folder or a hub id was expected")
            if not os.path.isfile(name):
                raise ValueError(f"--dataset {name}: neither a file nor a folder")
            if path.suffix.lower() not in SUFFIXES:
                raise ValueError(f"--dataset {name}: a file that ends in {', '.join(SUFFIXES)} was expected")
        else:
            self._hub = _from_hub(name, streaming)
        for file in self._files:
            if not os.access(file, os.R_OK):
                raise ValueError(f"--dataset {file}: permission denied; a readable file was expected")

    def fingerprint(self) -> str:
        """A hash that changes with the contents: of the files' bytes, or what `datasets` keeps of a hub data
        set."""
        digest = hashlib.sha256()
        if self._hub is not None:
            digest.update(
                str(self._hub._fingerprint if hasattr(self._hub, "_fingerprint") else self._hub.info).encode()
            )
        for file in self._files:
            digest.update(file.suffix.lower().encode())
            with open(file, "rb") as stream:
                digest.update(
                    hashlib.file_digest(stream, "sha256").digest()
                    if hasattr(hashlib, "file_digest")
                    else hashlib.sha256(stream.read()).digest()
                )
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Located]:
        if self._hub is not None:
            number = -1
            try:
                for number, record in enumerate(self._hub):
                    yield f"{self.name} row {number}", record
            except Exception as error:  # of the network, or of what the rows hold
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


def _from_hub(name, streaming):
    from datasets import load_dataset
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # it warns of each of its attempts
    try:
        return load_dataset(name, split="train", streaming=streaming)
    except Exception as error:  # the hub's errors share no base class
        reason = in_one_line(error) or type(error).__name__
        raise ValueError(
            f"--dataset {name}: neither a file nor a reachable hub data set has that name: {reason}"
        ) from None


def _from_disk(path):
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # what damaged directories raise has no base class either
        raise ValueError(f"--dataset {path}: {in_one_line(error)}") from None
    if isinstance(loaded, DatasetDict):
        if "train" not in loaded:
            raise ValueError(
                f"--dataset {path} has the splits {', '.join(loaded)}: a split named train was expected"
            )
        loaded = loaded["train"]
    return loaded


def _lines(file: Path, blank: bool = False) -> Iterator[Located]:
    """Each line, or each that is not blank, as text; BadRecord for one that is no UTF-8."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if blank or line.strip():
                try:
                    yield f"{file}:{number}", line.decode("utf-8")
                except UnicodeDecodeError as error:
                    problem = f"{file}:{number}: invalid UTF-8 at byte {error.start} of the line; UTF-8 was expected"
                    yield f"{file}:{number}", BadRecord(problem)


def _text(file: Path) -> str:
    """The whole file; raises BadRecord where it is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{file}: invalid UTF-8 at byte {error.start}; UTF-8 was expected") from None


def _read_jsonl(file):
    for where, line in _lines(file):
        if not isinstance(line, BadRecord):
            try:
                line = json.loads(line)
            except (ValueError, RecursionError) as error:
                line = BadRecord(f"{where}: invalid JSON ({error}); one object per line was expected")
        yield where, line


def _read_json(file):
    """An array of objects; or, as many files of that name have it, an object a line."""
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


def _read_csv(file):
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
            if None in record or None in record.values():
                given = (
                    len(record)
                    - (None in record)
                    + len(record.get(None) or ())
                    - list(record.values()).count(None)
                )
                yield (
                    where,
                    BadRecord(
                        f"{where}: {given} fields; {len(reader.fieldnames)} were expected, as in the header"
                    ),
                )
            else:
                yield where, record
    except csv.Error as error:
        raise BadRecord(f"{file}:{reader.reader.line_num}: invalid CSV ({error})") from None


def _read_parquet(file):
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(1000):
            for record in batch.to_pylist():
                yield f"{file} row {number}", record
                number += 1
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # of values that Python cannot hold, too
        raise BadRecord(f"{file}: invalid Parquet ({in_one_line(error)})") from None


def _read_text(file):
    """The file is one document."""
    yield str(file), {"text": _text(file)}


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
