"""Tokens of a data set: made once, kept in memory-mapped files by what they were made of.

A cache entry is a directory named by a hash of everything that decides its content (files, format, tokenizer
and chat template, flags); it has its name when it is complete:

    input_ids.bin   int32 [tokens]      trained.bin   bool [tokens]      offsets.bin   int64 [examples + 1]
    groups.bin      uint64 [examples]: equal where examples share the prompt
    where.txt       the place of each example, a line each
    meta.json       format, whether it was guessed, the kind of its prompts (of the first example), whether
    all is plain text,
                    what was skipped, the bytes of the other files

An entry whose files have other sizes is damaged, and made anew.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from data.formats import FORMATS, Rendered, guess_format, load_function, render
from data.sources import BadRecord, Source

IGNORED = -100
VERSION = 2
INSTRUCTION, CHAT, PLAIN = (
    "instruction",
    "chat",
    "plain",
)  # kinds of prompts: format_prompt's, a chat template's, a text
BATCH = 1000  # records that are tokenised at once; the tokenizer's threads divide them
NAMED = 5  # skipped records whose errors are kept word by word


@dataclass(frozen=True)
class Tokens:
    """The examples of one source as flat arrays: example i has the tokens offsets[i] to offsets[i + 1]."""

    input_ids: np.ndarray  # int32 [tokens]
    trained: np.ndarray  # bool [tokens]
    offsets: np.ndarray  # int64 [examples + 1]
    groups: np.ndarray  # uint64 [examples]
    directory: Path
    meta: dict

    @classmethod
    def open(cls, directory: Path) -> "Tokens":
        """Map the files of a complete entry."""
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
        """The place of an example, as error messages name it."""
        with open(self.directory / "where.txt", encoding="utf-8") as file:
            return next(islice(file, index, None)).rstrip("\n")


def cache_directory(chosen: str | None) -> Path:
    """--data_cache_dir, or markstep/tokens in the user's cache; where that cannot be written, a temporary
    directory."""
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
    """The tokens of the source `name`, from the cache or made now, with a progress bar.

    Prompt (with the tokenizer's BOS) and answer are tokenised apart, so that a prompt has the same tokens
    when the model is asked; an EOS ends each example. A chat has what its template writes, and nothing else.
    Raises ValueError with the place of the first record that is bad, or with skip_bad counts those.
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
        _fingerprint(tokenizer),
    ]
    entry = cache / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    if not _complete(entry):
        try:
            _make(entry, source, tokenizer, format_name, function, train_on_prompt, max_samples, skip_bad)
        except OSError as error:
            raise ValueError(
                f"the tokens of {name} cannot be kept in {cache}: {error.strerror}; --data_cache_dir chooses "
                "another directory"
            ) from None
    return Tokens.open(entry)


def _complete(entry: Path) -> bool:
    """Whether all files of a cache entry are there, with the sizes that they had."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(entry, source, tokenizer, format_name, function, train_on_prompt, max_samples, skip_bad):
    from tqdm import tqdm

    partial = Path(tempfile.mkdtemp(prefix=entry.name + ".", dir=entry.parent))
    meta = {"format": format_name, "guessed": False, "plain_text": True, "skipped": 0, "named": []}
    offsets = [0]
    try:
        with ExitStack() as stack:
            files = {
                kind: stack.enter_context(open(partial / f"{kind}.bin", "wb"))
                for kind in ("input_ids", "trained", "groups", "offsets")
            }
            places = stack.enter_context(open(partial / "where.txt", "w", encoding="utf-8"))
            progress = stack.enter_context(tqdm(desc=f"tokenize {source.name}", unit="record"))
            records = _rendered(islice(source, max_samples), meta, function, tokenizer, skip_bad)
            while batch := list(islice(records, BATCH)):
                examples = _encode([rendered for _, rendered in batch], tokenizer, train_on_prompt)
                for (where, rendered), (ids, trained) in zip(batch, examples, strict=True):
                    group = hashlib.sha256(rendered.question.encode()).digest()[:8]
                    for kind, value in (("input_ids", ids), ("trained", trained), ("groups", group)):
                        files[kind].write(value)
                    places.write(" ".join(where.split("\n")) + "\n")
                    offsets.append(offsets[-1] + len(ids))
                progress.update(len(batch))
            files["offsets"].write(np.array(offsets, np.int64))
        if len(offsets) == 1:
            rest = (
                f"; {meta['skipped']} were skipped, the first: {meta['named'][0]}" if meta["skipped"] else ""
            )
            raise ValueError(
                f"--dataset {source.name}: the data set is empty; at least one record was expected{rest}"
            )
        meta["files"] = {path.name: path.stat().st_size for path in partial.iterdir()}
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
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
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _rendered(records, meta, function, tokenizer, skip_bad) -> Iterator[tuple[str, Rendered]]:
    """(where, example) of each record that can be used; fills `meta`."""
    records = iter(records)
    while True:
        try:
            where, record = next(records)
            if isinstance(record, BadRecord):
                raise record
            rendered = _render(record, where, meta, function, tokenizer)
            meta["plain_text"] &= rendered.spans is None and not rendered.prompt
            yield where, rendered
        except StopIteration:
            return
        except BadRecord as error:
            if not skip_bad:
                raise ValueError(f"{error} (--skip_bad leaves such records out)") from None
            meta["skipped"] += 1
            if len(meta["named"]) < NAMED:
                meta["named"].append(str(error))


def _render(record, where, meta, function, tokenizer):
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


def _encode(
    batch: list[Rendered], tokenizer, train_on_prompt: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32, trained bool) of each example, in order."""
    for by_template, run in groupby(batch, lambda example: example.spans is not None):
        yield from (_encode_chats if by_template else _encode_texts)(list(run), tokenizer, train_on_prompt)


def _encode_chats(batch, tokenizer, train_on_prompt):
    """Each token with a part in what is trained is trained, as in transformers."""
    if not tokenizer.is_fast:
        raise ValueError(
            "chats need a fast tokenizer (tokenizer.json), which says where in the text its tokens are"
        )
    encoded = tokenizer(
        [example.text for example in batch],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for example, ids, places in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        first, last = np.array(places, np.int64).reshape(-1, 2).T
        # Some tokenizers trim white space from the places: a token begins where the one before it ends.
        first = np.minimum(first, np.concatenate([[0], last[:-1]]))
        trained = np.full(len(ids), train_on_prompt)
        for start, stop in example.spans:
            trained |= (first < stop) & ((last > start) | (first >= start))
        yield np.array(ids, np.int32), trained


def _encode_texts(batch, tokenizer, train_on_prompt):
    end = tokenizer.eos_token_id
    # verbose=False: it would warn of lengths that are handled later.
    prompts = tokenizer([example.prompt for example in batch], verbose=False)["input_ids"]
    texts = tokenizer([example.text for example in batch], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    for prompt, text in zip(prompts, texts, strict=True):
        prompt = without_end(prompt, end)
        ids = np.array([*prompt, *text, end], np.int32)
        yield ids, (np.arange(len(ids)) >= len(prompt)) | train_on_prompt


def without_end(ids: list[int], end: int) -> list[int]:
    """A prompt's tokens without the end of text that some tokenizers add."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids


def _fingerprint(tokenizer) -> str:
    """A hash of what decides the tokens of a text."""
    vocabulary = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    settings = [
        type(tokenizer).__name__,
        vocabulary,
        tokenizer.chat_template,
        tokenizer.bos_token,
        tokenizer.eos_token,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()
