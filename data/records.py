"""Instruction records in dolly's fields, and their tokens and labels."""
import codecs
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

IGNORED = -100
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)      # name, or owner/name
SURROGATE = re.compile("[\ud800-\udfff]")


class Example(NamedTuple):
    """One record as int32 arrays [tokens]: labels repeat the ids of what is trained, and are -100 elsewhere."""

    input_ids: np.ndarray
    labels: np.ndarray


def load_records(dataset: str) -> list[dict[str, str]]:
    """Records {instruction, context, response} of a JSONL file, or of a hub id through `datasets` (its split "train").

    Raises ValueError that names the file and line (or the row), the field, and what was expected.
    """
    is_hub_id = HUB_ID.fullmatch(dataset) and not dataset.lower().endswith((".json", ".jsonl", ".txt", ".csv", ".parquet"))
    records = _read_hub(dataset) if is_hub_id and not os.path.exists(dataset) else _read_jsonl(dataset)
    if not records:
        raise ValueError(f"--dataset {dataset}: the data set is empty; at least one record was expected")
    return records


def _read_jsonl(path: str) -> list[dict[str, str]]:
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"--dataset {path}: no such file; a JSONL file or a hub id was expected") from None
    except IsADirectoryError:
        raise ValueError(f"--dataset {path or '(empty)'}: a directory; a JSONL file or a hub id was expected") from None
    except OSError as error:
        raise ValueError(f"--dataset {path}: {error.strerror}; a readable JSONL file was expected") from None
    records = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: invalid UTF-8 at byte {error.start} of the line; UTF-8 was expected") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: invalid JSON ({error}); one object per line was expected") from None
        records.append(_checked(record, where))
    return records


def _read_hub(dataset: str) -> list[dict[str, str]]:
    from datasets import load_dataset
    from huggingface_hub.utils.logging import set_verbosity_error
    set_verbosity_error()               # it warns of each of its attempts
    try:
        rows = load_dataset(dataset, split="train")
    except Exception as error:          # the hub's errors share no base class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"--dataset {dataset}: neither a file nor a reachable hub data set has that name: "
                         f"{reason}") from None
    return [_checked(row, f"{dataset} row {number}") for number, row in enumerate(rows)]


def _checked(record, where: str) -> dict[str, str]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: an object with instruction, context and response was expected")
    fields = {name: record.get(name) for name in ("instruction", "context", "response")}
    fields["context"] = "" if fields["context"] is None else fields["context"]
    for name, value in fields.items():
        if not isinstance(value, str):
            problem = "is missing" if value is None else f"is {type(value).__name__}"
            raise ValueError(f"{where}: the field {name!r} {problem}; a text was expected")
        if not value.strip() and name != "context":
            raise ValueError(f"{where}: the field {name!r} is empty; a text was expected")
        if SURROGATE.search(value):     # JSON can escape half a pair, and no tokenizer takes it
            raise ValueError(f"{where}: the field {name!r} has a lone surrogate; Unicode text was expected")
    return fields


def format_prompt(instruction: str, context: str = "") -> str:
    """The prompt up to the answer, as the LoRA tutorial for Trainium writes it."""
    parts = [f"### Instruction\n{instruction}", *([f"### Context\n{context}"] if context else []), "### Answer\n"]
    return "\n\n".join(parts)


def tokenize(records: list[dict[str, str]], tokenizer, max_length: int) -> tuple[list[Example], int, int]:
    """(examples, how many were truncated to `max_length` tokens, how many were dropped because no target was left).

    Prompt (with the tokenizer's BOS) and answer are tokenised apart, so that a prompt has the same tokens when the
    model is asked; labels are on the answer and its EOS. Dropped examples are among the truncated. Raises ValueError
    where the tokenizer has no EOS, or no example is left.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no EOS token, which ends every answer")
    texts = [format_prompt(record["instruction"], record.get("context") or "") for record in records]
    prompts = tokenizer(texts, verbose=False)["input_ids"]      # it would warn of lengths that are handled below
    answers = tokenizer([record["response"] for record in records], add_special_tokens=False, verbose=False)["input_ids"]
    examples, truncated, dropped = [], 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt and prompt[-1] == end:
            prompt = prompt[:-1]
        ids = np.array([*prompt, *answer, end], dtype=np.int32)
        labels = ids.copy()
        labels[:len(prompt)] = IGNORED
        truncated += len(ids) > max_length
        if len(prompt) >= max_length:
            dropped += 1
        else:
            examples.append(Example(ids[:max_length], labels[:max_length]))
    if not examples:
        raise ValueError(f"no example has a target token within --max_seq_length {max_length}: all prompts are longer")
    return examples, truncated, dropped


def split(examples: list[Example], percentage: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples, `percentage` of them held out: a choice by `seed`, each side in the given order.

    At least one is held out, and one is left; raises ValueError where that cannot be.
    """
    if not 1 <= percentage <= 99:
        raise ValueError(f"the percentage to hold out is {percentage}: 1 to 99 was expected")
    if len(examples) < 2:
        raise ValueError(f"holding out a part for evaluation needs at least two examples; there are {len(examples)}")
    count = min(len(examples) - 1, max(1, len(examples) * percentage // 100))
    held_out = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    return ([example for index, example in enumerate(examples) if index not in held_out],
            [examples[index] for index in sorted(held_out)])
