"""Held-out examples as questions, and the answers that a model gives in the middle of its training."""

from dataclasses import dataclass

import numpy as np

from data.packing import Rows
from model.generation import Generator, capacity_for
from model.llama import Llama
from parallel.mesh import Group
from parallel.runtime import Runtime
from trainer.job import Job

NEW_TOKENS = 64  # of a sample's answer
TOGETHER = 8  # questions that are answered at once


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what it should answer, as tokens; from which example of which source."""

    source: int
    example: int
    prompt: list[int]
    expected: list[int]


def questions(rows: Rows, longest: int, count: int | None = None) -> list[Question]:
    """The first `count` examples (default: all) whose prompt has at most `longest` tokens, in the order of
    the data.

    The prompt is what precedes the first token that trains, and the answer what trains from there. Where
    everything trains (plain text, --train_on_prompt), the first half asks for the second.
    """
    found, pieces = [], rows.pieces
    for source, start, stop in zip(pieces.source, pieces.start, pieces.stop, strict=True):
        if count is not None and len(found) == count:
            break
        tokens = rows.tokens[source]
        ids, trained = tokens.input_ids[start:stop], tokens.trained[start:stop]
        first = int(np.argmax(trained)) or max(1, len(ids) // 2)
        if first <= longest:
            last = first + int(np.argmin(np.append(trained[first:], False)))
            example = int(np.searchsorted(tokens.offsets, start, side="right")) - 1
            found.append(Question(int(source), example, ids[:first].tolist(), ids[first:last].tolist()))
    return found


class Samples:
    """The first --eval_samples held-out questions of a run, and their answers by the model as it is.

    Every rank has one. The graphs are one a bucket of prompt lengths and one for decoding, however often it
    answers.
    """

    def __init__(self, runtime: Runtime, model: Llama, job: Job, group: Group):
        positions, wanted = job.model_config.max_position_embeddings, job.config.eval_samples
        self._questions = (
            questions(job.eval_rows, positions - NEW_TOKENS, wanted) if job.eval_rows and wanted else []
        )
        self._tokenizer = job.tokenizer
        if self._questions:
            self._ends = job.ends
            capacity = capacity_for(max(len(each.prompt) for each in self._questions), NEW_TOKENS, positions)
            self._generator = Generator(runtime, model, group, min(TOGETHER, len(self._questions)), capacity)

    def generate(self) -> list[dict[str, str]]:
        """The text of prompt, answer (greedy) and expected answer of each question; the host waits for the
        device."""
        if not self._questions:
            return []
        answers = self._generator.generate([each.prompt for each in self._questions], NEW_TOKENS, self._ends)
        return [
            {
                "prompt": self._text(each.prompt),
                "answer": self._text(answer),
                "expected": self._text(each.expected),
            }
            for each, answer in zip(self._questions, answers, strict=True)
        ]

    def _text(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True)
