"""How the next token of an answer is chosen from its logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: transformers' settings of the same names, applied in its order by its own
    processors.

    `temperature` 0 takes the most probable token; `top_k` 0, `top_p` 1 and `repetition_penalty` 1 change
    nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        """Raise ValueError for values that cannot be."""
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise ValueError(f"--{name} {getattr(self, name)}: {expected} was expected")

    @property
    def is_greedy(self) -> bool:
        """Whether the token with the largest logit is taken as it is."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def chooser(self, number: int) -> Callable[[list[int], torch.Tensor], int]:
        """(tokens so far, logits fp32 [vocabulary] on the CPU) -> the next token, of prompt `number`.

        Of prompt i it draws as transformers does after torch.manual_seed(seed + i), whatever is in the batch
        beside it.
        """
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        processors, generator = LogitsProcessorList(), torch.Generator().manual_seed(self.seed + number)
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature:
            processors += [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
            processors += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            processors += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []

        def choose(tokens: list[int], logits: torch.Tensor) -> int:
            scores = (
                processors(torch.tensor([tokens]), logits.unsqueeze(0)) if processors else logits.unsqueeze(0)
            )
            if self.temperature:
                return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
            return int(scores.argmax(-1))

        return choose


GREEDY = Sampling()
