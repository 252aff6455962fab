"""The tokens of a data set, which are made once and cached in memory-mapped files.

A cache entry is named by a hash of everything that determines its contents (files, format, tokenizer, chat
template and its date, flags). data/token_cache.py keeps entries; this one has the files

    input_ids.bin   int32 [tokens]
    trained.bin     bool [tokens]
    offsets.bin     int64 [examples + 1]
    groups.bin      uint64 [examples], equal where examples share the prompt
    where.txt       a line per example: its position in the data set
    meta.json       format, guessed (whether `auto` chose it), prompts (the kind, by the first example),
                    plain_text (whether all examples are), skipped and named (bad records), where there are
                    any, unread (fields) and warnings, each with the number of examples and the first one's
                    position, pairs (true where two examples are a preference pair, the chosen one first),
                    and what data/token_cache.py adds
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from data.dates import on_constant_date, pinned_date
from data.encoding import encode, tokenizer_fingerprint
from data.formats import FORMATS, Rendered, guess_format, load_function, name_in, render
from data.preferences import PREFERENCE, PROMPT, render_pair
from data.sources import BadRecord, Source
from data.token_cache import ALONE, NOT_OURS, Maker, places, read_entry, warn, write_entry

IGNORED = -100  # the label of a position that trains nothing
VERSION = 3  # of the cache
INSTRUCTION, CHAT, PLAIN = "instruction", "chat", "plain"  # prompts of format_prompt, chat templates, texts
BATCH = 1000  # records that are tokenized at once; the tokenizer's threads divide them
NAMED = 5  # skipped records whose errors are kept in full
Example = tuple[str, Rendered, np.ndarray, np.ndarray]  # position, texts, ids, trained


@dataclass(frozen=True)
class Tokens:
    """The examples of one data set as flat arrays; example i has the tokens offsets[i] to offsets[i + 1].

    `note` says what of the data set was left out ("": nothing).
    """

    input_ids: np.ndarray  # int32 [tokens]
    trained: np.ndarray  # bool [tokens]
    offsets: np.ndarray  # int64 [examples + 1]
    groups: np.ndarray  # uint64 [examples]
    directory: Path
    meta: dict
    note: str = ""

    @classmethod
    def open(cls, directory: Path, checked: bool = False) -> "Tokens":
        """Map the files of a cache entry, after they were checked, or of one that another process has just
        `checked`.

        Raises ValueError where the entry is damaged, and OSError where it cannot be read.
        """
        meta = read_entry(directory, checked)
        kinds = {"input_ids": np.int32, "trained": np.bool_, "offsets": np.int64, "groups": np.uint64}
        arrays = {name: np.memmap(directory / f"{name}.bin", kind, "r") for name, kind in kinds.items()}
        return cls(**arrays, directory=directory, meta=meta)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def digest(self) -> str:
        """A hash of the arrays, which meta.json has the checksums of."""
        arrays = {name: each for name, each in self.meta["files"].items() if name.endswith(".bin")}
        return hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()

    def where(self, index: int) -> str:
        """The position of an example in the data set, for error messages."""
        with open(self.directory / "where.txt", encoding="utf-8") as file:
            return next(islice(file, index, None)).rstrip("\n")


def tokenize(
    name: str,
    tokenizer,
    *,
    format_name: str = "auto",
    train_on_prompt: bool = False,
    max_samples: int | None = None,
    skip_bad: bool = False,
    streaming: bool = False,
    pairs: bool = False,
    cache: Path,
    maker: Maker = ALONE,
) -> Tokens:
    """The tokens of the data set `name`, from the cache or made now, with a progress bar.

    With `pairs`, each record is a preference pair, and makes two examples: of the chosen and of the rejected
    answer, in this order. Raises ValueError, which names the position, for the first bad record; with
    skip_bad, bad records are counted. `maker` says which of several processes makes them.
    """
    source = Source(name, streaming)
    function, code = load_function(format_name) if ":" in format_name else (None, "")
    formats = [PREFERENCE] if pairs else list(FORMATS)
    if function is None and format_name not in ("auto", *formats):
        raise ValueError(
            f"--format {format_name}: auto, {', '.join(formats)} or module:function was expected"
            f"{' with --objective dpo' if pairs else ''}"
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
        pinned_date(tokenizer),
        *([PREFERENCE] if pairs else []),
    ]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def write(directory: Path) -> dict:
        meta = {"format": format_name, "guessed": False, "plain_text": True, "skipped": 0, "named": []}
        meta |= {"pairs": True} if pairs else {}
        records = _rendered(islice(source, max_samples), meta, function, tokenizer, skip_bad)
        if not _write_examples(directory, _encoded(records, source.name, tokenizer, train_on_prompt)):
            skipped = (
                f"; {meta['skipped']} were skipped, the first: {meta['named'][0]}" if meta["skipped"] else ""
            )
            raise ValueError(
                f"--dataset {name}: the data set is empty; at least one record was expected{skipped}"
            )
        return meta

    return replace(_read_or_make(cache, key, name, write, maker), note=source.note)


def _read_or_make(cache: Path, key: str, name: str, write: Callable[[Path], dict], maker: Maker) -> Tokens:
    """The tokens of the data set `name` from the entry `key`, which is made where it is not there or damaged.

    Where this user may not read or write in `cache`, they are kept elsewhere. Raises ValueError where they
    cannot be kept.
    """
    for place in places(cache):
        entry = place / key
        try:
            if (found := _open(entry, name)) is not None:
                return found
            made = maker.made_by_another()
            if made and (found := _open(made, name)) is not None:
                return found
            write_entry(entry, write, maker)
            return Tokens.open(entry)
        except OSError as error:
            problem = f"{error.filename or entry}: {error.strerror}"
            if error.errno not in NOT_OURS:
                break
            warn(f"the tokens of {name} cannot be kept in {place} ({problem}); another directory is taken")
    raise ValueError(
        f"the tokens of {name} cannot be kept in {place} ({problem}); --data_cache_dir chooses another "
        "directory"
    )


def _open(entry: Path, name: str) -> Tokens | None:
    """The tokens in an entry; None where there is none, or a damaged one. Raises OSError where it cannot be
    read."""
    if not os.path.lexists(entry):
        return None
    try:
        return Tokens.open(entry)
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        warn(f"the tokens of {name} in {entry} are damaged ({error}): they are made anew")
        return None


def _write_examples(directory: Path, examples: Iterator[Example]) -> int:
    """Write the files of an entry; returns the number of examples."""
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
            for name, rendered in _render(record, where, meta, function, tokenizer).items():
                meta["plain_text"] &= rendered.spans is None and not rendered.prompt
                for kind in ("unread", "warnings"):
                    for each in getattr(rendered, kind):
                        found = meta.setdefault(kind, {}).setdefault(each, {"examples": 0, "first": where})
                        found["examples"] += 1
                yield where + name, rendered
        except StopIteration:
            return
        except BadRecord as error:
            if not skip_bad:
                raise ValueError(f"{error} (--skip_bad leaves such records out)") from None
            meta["skipped"] += 1
            if len(meta["named"]) < NAMED:
                meta["named"].append(str(error))


def _render(record, where: str, meta: dict, function, tokenizer) -> dict[str, Rendered]:
    """{what is added to the position: the texts} of a record's example, of a pair's two.

    The first record sets meta's prompts, and its format where that is `auto`.
    """
    if function is not None:
        try:
            record = function(record)
            where += f", as --format {meta['format']} returns it"
        except (Exception, SystemExit) as error:  # the user's code
            raise BadRecord(
                f"{where}: --format {meta['format']} raises {type(error).__name__}: {error}"
            ) from None
    guess = PREFERENCE if meta.get("pairs") else None
    if function is None and meta["format"] == "auto":
        meta |= {"format": guess or guess_format(record, where), "guessed": True}
    name = meta["format"] if function is None else guess or guess_format(record, where)
    rendered = _examples(record, where, name, tokenizer)
    if pinned_date(tokenizer):  # the question decides what is held out, on every day the same
        with on_constant_date(tokenizer):
            constant = _examples(record, where, name, tokenizer)
        rendered = {key: replace(rendered[key], question=constant[key].question) for key in rendered}
    chat = any(each.spans is not None for each in rendered.values())
    instruction = (
        name in ("dolly", "alpaca") or name == PREFERENCE and name_in(record, PROMPT) == "instruction"
    )
    meta.setdefault("prompts", CHAT if chat else INSTRUCTION if instruction else PLAIN)
    return rendered


def _examples(record, where: str, name: str, tokenizer) -> dict[str, Rendered]:
    """As _render, of a record of the format `name`."""
    if name != PREFERENCE:
        return {"": render(record, where, name, tokenizer)}
    return dict(zip((", chosen", ", rejected"), render_pair(record, where, tokenizer), strict=True))
