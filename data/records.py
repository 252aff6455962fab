"""Instruction records in dolly's fields, and their tokens and labels."""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

IGNORED = -100


class Example(NamedTuple):
    """One record as int32 arrays [tokens]: labels repeat the ids of what is trained, and are -100 elsewhere."""

    input_ids: np.ndarray
    labels: np.ndarray


def load_records(dataset: str) -> list[dict[str, str]]:
    """Records {instruction, context, response} of a JSONL file, or of a hub id through `datasets` (its split "train").

    Raises ValueError that names the file and line (or the row), the field, and what was expected.
    """
    if Path(dataset).exists() or dataset.startswith((".", "/", "~")) or dataset.endswith((".json", ".jsonl")):
        records = _read_jsonl(Path(dataset))
    else:
        records = _read_hub(dataset)
    if not records:
        raise ValueError(f"--dataset {dataset}: the data set is empty; at least one record was expected")
    return records


def _read_jsonl(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"--dataset {path}: no such file; a JSONL file or a hub id was expected")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: invalid UTF-8 at byte {error.start}") from None
        except ValueError as error:
            raise ValueError(f"{where}: invalid JSON ({error})") from None
        records.append(_checked(record, where))
    return records


def _read_hub(dataset: str) -> list[dict[str, str]]:
    from datasets import load_dataset
    try:
        rows = load_dataset(dataset, split="train")
    except Exception as error:          # the hub's errors share no base class
        raise ValueError(f"--dataset {dataset}: no file of that name, and the hub does not give it: "
                         f"{str(error).splitlines()[0]}") from None
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
    return fields


def format_prompt(instruction: str, context: str = "") -> str:
    """The prompt up to the answer, as the LoRA tutorial for Trainium writes it."""
    parts = [f"### Instruction\n{instruction}", *([f"### Context\n{context}"] if context else []), "### Answer\n"]
    return "\n\n".join(parts)


def tokenize(records: list[dict[str, str]], tokenizer, max_length: int) -> tuple[list[Example], int, int]:
    """(examples, how many were truncated to `max_length` tokens, how many were dropped because no target was left).

    Prompt (with the tokenizer's BOS) and answer are tokenised apart, so that a prompt has the same tokens when the model is asked;
    labels are on the answer and its EOS. Raises ValueError where the tokenizer has no EOS, or no example is left.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no EOS token, which ends every answer")
    prompts = tokenizer([format_prompt(record["instruction"], record["context"]) for record in records])["input_ids"]
    answers = tokenizer([record["response"] for record in records], add_special_tokens=False)["input_ids"]
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
    """(training, held-out) examples, a random choice by `seed`; at least one is held out, and one must be left."""
    if len(examples) < 2:
        raise ValueError("holding out a part for evaluation needs at least two examples")
    count = min(len(examples) - 1, max(1, len(examples) * percentage // 100))
    held_out = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    return ([example for index, example in enumerate(examples) if index not in held_out],
            [examples[index] for index in sorted(held_out)])
