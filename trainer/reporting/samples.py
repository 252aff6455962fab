"""Held-out examples as prompts, and the answers that the model generates to them during training."""

from dataclasses import dataclass

import numpy as np

from data.packing import Rows
from model.generation import Generator, capacity_for
from model.llama import Llama
from parallel.mesh import Group
from parallel.runtime import Runtime
from trainer.job import Job

NEW_TOKENS = 64  # the most tokens of an answer
BATCH = 8  # questions that are answered at once


@dataclass(frozen=True)
class Question:
    """A prompt and the expected answer, as token ids, and the example and source that they are from."""

    source: int
    example: int
    prompt: list[int]
    expected: list[int]


def questions(rows: Rows, longest: int, count: int | None = None) -> list[Question]:
    """The first `count` examples (default: all) whose prompt has at most `longest` tokens, in order.

    The prompt ends before the first trained token, and the expected answer is the run of trained tokens that
    begins there. Where all tokens are trained (plain text, --train_on_prompt), the first half is the prompt.
    Of a preference pair, the chosen answer is the expected one.
    """
    found, pieces, step = [], rows.pieces, 2 if rows.segments else 1
    each_piece = zip(pieces.source[::step], pieces.start[::step], pieces.stop[::step], strict=True)
    for source, start, stop in each_piece:
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
    """The first --eval_samples held-out questions of a run, which the model answers at each evaluation.

    Every rank has a Samples. There is one graph for each bucket of prompt lengths and one for decoding,
    however often questions are answered.
    """

    def __init__(self, runtime: Runtime, model: Llama, job: Job, group: Group):
        positions, wanted = job.model_config.max_positions, job.config.eval_samples
        self._questions = (
            questions(job.eval_rows, positions - NEW_TOKENS, wanted) if job.eval_rows and wanted else []
        )
        self._tokenizer = job.tokenizer
        if self._questions:
            self._ends = job.ends
            capacity = capacity_for(max(len(each.prompt) for each in self._questions), NEW_TOKENS, positions)
            self._generator = Generator(runtime, model, group, min(BATCH, len(self._questions)), capacity)

    def generate(self) -> list[dict[str, str]]:
        """{prompt, answer, expected} of each question as texts; the answer is decoded greedily.

        The host waits for the device.
        """
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
