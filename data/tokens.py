"""The tokens of a data set, which are made once and cached in memory-mapped files.

A cache entry is a directory named by a hash of everything that determines its contents (files, format,
tokenizer, chat template, flags). It only gets this name when it is complete:

    input_ids.bin   int32 [tokens]
    trained.bin     bool [tokens]
    offsets.bin     int64 [examples + 1]
    groups.bin      uint64 [examples], equal where examples share the prompt
    where.txt       a line per example: its position in the data set
    meta.json       format, guessed (whether `auto` chose it), prompts (the kind, by the first example),
                    plain_text (whether all examples are), skipped and named (bad records),
                    files (the sizes of the others); where there are any, unread (fields) and warnings, each
                    with the number of examples and the first one's position

An entry whose files have other sizes is damaged, and made again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data.encoding import encode, tokenizer_fingerprint
from data.formats import FORMATS, Rendered, guess_format, load_function, render
from data.sources import BadRecord, Source

IGNORED = -100  # the label of a position that trains nothing
VERSION = 3  # of the cache
INSTRUCTION, CHAT, PLAIN = "instruction", "chat", "plain"  # prompts of format_prompt, chat templates, texts
BATCH = 1000  # records that are tokenized at once; the tokenizer's threads divide them
NAMED = 5  # skipped records whose errors are kept in full
Example = tuple[str, Rendered, np.ndarray, np.ndarray]  # position, texts, ids, trained


@dataclass(frozen=True)
class Tokens:
    """The examples of one data set as flat arrays; example i has the tokens offsets[i] to offsets[i + 1]."""

    input_ids: np.ndarray  # int32 [tokens]
    trained: np.ndarray  # bool [tokens]
    offsets: np.ndarray  # int64 [examples + 1]
    groups: np.ndarray  # uint64 [examples]
    directory: Path
    meta: dict

    @classmethod
    def open(cls, directory: Path) -> "Tokens":
        """Map the files of a complete cache entry."""
        kinds = {"input_ids": np.int32, "trained": np.bool_, "offsets": np.int64, "groups": np.uint64}
        arrays = {name: np.memmap(directory / f"{name}.bin", kind, "r") for name, kind in kinds.items()}
        return cls(
            **arrays,
            directory=directory,
            meta=json.loads((directory / "meta.json").read_text(encoding="utf-8")),
        )

    def __len__(self) -> int:
        return len(self.groups)

    def where(self, index: int) -> str:
        """The position of an example in the data set, for error messages."""
        with open(self.directory / "where.txt", encoding="utf-8") as file:
            return next(islice(file, index, None)).rstrip("\n")


def cache_directory(chosen: str | None) -> Path:
    """The directory `chosen` (--data_cache_dir); default: markstep/tokens in the user's cache.

    Where the user's cache cannot be written, it is a temporary directory. Raises ValueError where `chosen`
    cannot be written.
    """
    directory = Path(
        chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "markstep" / "tokens"
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        if chosen:
            raise ValueError(f"--data_cache_dir {chosen} cannot be written: {error.strerror}") from None
        return Path(tempfile.mkdtemp(prefix="markstep-tokens-"))


def tokenize(
    name: str,
    tokenizer,
    *,
    format_name: str = "auto",
    train_on_prompt: bool = False,
    max_samples: int | None = None,
    skip_bad: bool = False,
    streaming: bool = False,
    cache: Path,
) -> Tokens:
    """The tokens of the data set `name`, from the cache or made now, with a progress bar.

    Raises ValueError, which names the position, for the first bad record; with skip_bad, bad records are
    counted.
    """
    source = Source(name, streaming)
    function, code = load_function(format_name) if ":" in format_name else (None, "")
    if function is None and format_name not in ("auto", *FORMATS):
        raise ValueError(
            f"--format {format_name}: auto, {', '.join(FORMATS)} or module:function was expected"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which ends every example")
    settings = [
        VERSION,
        name,
        source.fingerprint(),
        format_name,
        code,
        train_on_prompt,
        max_samples,
        skip_bad,
        tokenizer_fingerprint(tokenizer),
    ]
    entry = cache / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    if not _complete(entry):
        meta = {"format": format_name, "guessed": False, "plain_text": True, "skipped": 0, "named": []}
        records = _rendered(islice(source, max_samples), meta, function, tokenizer, skip_bad)
        examples = _encoded(records, source.name, tokenizer, train_on_prompt)
        try:
            _make(entry, source.name, examples, meta)
        except OSError as error:
            raise ValueError(
                f"the tokens of {name} cannot be kept in {cache}: {error.strerror}; --data_cache_dir chooses "
                "another directory"
            ) from None
    return Tokens.open(entry)


def _complete(entry: Path) -> bool:
    """Whether all files of a cache entry are there, with their sizes in meta.json."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(entry: Path, source_name: str, examples: Iterator[Example], meta: dict) -> None:
    """Write a cache entry; `meta` is complete when the examples have been iterated over."""
    partial = Path(tempfile.mkdtemp(prefix=entry.name + ".", dir=entry.parent))
    try:
        if not _write_examples(partial, examples):
            skipped = (
                f"; {meta['skipped']} were skipped, the first: {meta['named'][0]}" if meta["skipped"] else ""
            )
            raise ValueError(
                f"--dataset {source_name}: the data set is empty; at least one record was expected{skipped}"
            )
        meta["files"] = {path.name: path.stat().st_size for path in partial.iterdir()}
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        _publish(partial, entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_examples(directory: Path, examples: Iterator[Example]) -> int:
    """Write the files of an entry, except meta.json; returns the number of examples."""
    offsets = [0]
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(directory / f"{name}.bin", "wb"))
            for name in ("input_ids", "trained", "groups", "offsets")
        }
        positions = stack.enter_context(open(directory / "where.txt", "w", encoding="utf-8"))
        for where, rendered, ids, trained in examples:
            files["input_ids"].write(ids)
            files["trained"].write(trained)
            files["groups"].write(hashlib.sha256(rendered.question.encode()).digest()[:8])
            positions.write(" ".join(where.split("\n")) + "\n")
            offsets.append(offsets[-1] + len(ids))
        files["offsets"].write(np.array(offsets, np.int64))
    return len(offsets) - 1


def _publish(partial: Path, entry: Path) -> None:
    """Give a complete entry its name; a damaged entry of that name is deleted."""
    if entry.is_file():
        entry.unlink()
    elif entry.exists() and not _complete(entry):
        shutil.rmtree(entry)
    try:
        os.rename(partial, entry)
    except OSError:  # another run made the same entry meanwhile
        if not _complete(entry):
            raise
        shutil.rmtree(partial)


def _encoded(
    records: Iterator[tuple[str, Rendered]], name: str, tokenizer, train_on_prompt: bool
) -> Iterator[Example]:
    """The examples with their tokens, made in batches, with a progress bar."""
    from tqdm import tqdm

    with tqdm(desc=f"tokenize {name}", unit="record") as progress:
        while batch := list(islice(records, BATCH)):
            tokens = encode([rendered for _, rendered in batch], tokenizer, train_on_prompt)
            for (where, rendered), (ids, trained) in zip(batch, tokens, strict=True):
                yield where, rendered, ids, trained
            progress.update(len(batch))


def _rendered(records, meta, function, tokenizer, skip_bad) -> Iterator[tuple[str, Rendered]]:
    """(position, texts) of each record that can be used; completes `meta`.

    Raises ValueError for the first bad record, unless skip_bad.
    """
    records = iter(records)
    while True:
        try:
            where, record = next(records)
            if isinstance(record, BadRecord):
                raise record
            rendered = _render(record, where, meta, function, tokenizer)
            meta["plain_text"] &= rendered.spans is None and not rendered.prompt
            for kind in ("unread", "warnings"):
                for each in getattr(rendered, kind):
                    found = meta.setdefault(kind, {}).setdefault(each, {"examples": 0, "first": where})
                    found["examples"] += 1
            yield where, rendered
        except StopIteration:
            return
        except BadRecord as error:
            if not skip_bad:
                raise ValueError(f"{error} (--skip_bad leaves such records out)") from None
            meta["skipped"] += 1
            if len(meta["named"]) < NAMED:
                meta["named"].append(str(error))


def _render(record, where: str, meta: dict, function, tokenizer) -> Rendered:
    """The texts of a record. The first one sets meta's prompts, and its format where that is `auto`."""
    if function is not None:
        try:
            record = function(record)
        except (Exception, SystemExit) as error:  # the user's code
            raise BadRecord(
                f"{where}: --format {meta['format']} raises {type(error).__name__}: {error}"
            ) from None
    elif meta["format"] == "auto":
        meta |= {"format": guess_format(record, where), "guessed": True}
    name = meta["format"] if function is None else guess_format(record, where)
    rendered = render(record, where, name, tokenizer)
    meta.setdefault(
        "prompts",
        CHAT if rendered.spans is not None else INSTRUCTION if name in ("dolly", "alpaca") else PLAIN,
    )
    return rendered
