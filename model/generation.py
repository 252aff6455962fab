"""Answers, token by token: a forward pass with a cache of keys and values, and the choice of the next token.

Shapes are static. A batch of prompts is padded to a bucket's length, and there is one graph for the prefill
of each bucket and one for all decoding steps: where a row is in its sequence is data, and what the host
chooses from the logits is no part of a graph. Every rank gathers the logits of the whole vocabulary and
chooses by the same rule and seeds, so all choose the same token.

Through the stages of a pipeline a batch goes whole, and one stage after the other has its turn, which is
data. The others compute meanwhile too, but remember nothing.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.attention.blockwise import attend, segment_masks
from model.attention.rotary import rotary_cos_sin
from model.llama import Llama
from parallel.collectives import all_gather, permute
from parallel.mesh import Group
from parallel.runtime import Runtime

SMALLEST_BUCKET = 32
ROUNDED_TO = 64  # capacities, so that runs whose lengths differ a little share their graphs


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


def bucket_of(length: int, capacity: int) -> int:
    """The length to which a prompt of `length` tokens is padded: a power of two, but no more than the
    capacity."""
    return min(capacity, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))


def capacity_for(longest_prompt: int, max_new_tokens: int, positions: int) -> int:
    """The length of a cache for prompts of up to so many tokens; raises ValueError where the model has fewer
    positions."""
    needed = longest_prompt + max_new_tokens
    if needed > positions:
        raise ValueError(
            f"a prompt of {longest_prompt} tokens and --max_new_tokens {max_new_tokens} are more than the model's "
            f"positions (max_position_embeddings {positions}): shorten one of them"
        )
    return -(-needed // ROUNDED_TO) * ROUNDED_TO


class Generator:
    """A model with a cache for `batch_size` sequences of up to `capacity` tokens; all ranks of `group`, and
    of all stages, have one each.

    Nothing of training is needed or changed: it may be made of a model that is being trained.
    """

    def __init__(self, runtime: Runtime, model: Llama, group: Group, batch_size: int, capacity: int):
        self.batch_size, self.capacity = batch_size, capacity
        self._runtime, self._model = runtime, model
        config = model.config
        shape = (capacity, batch_size, max(1, config.num_key_value_heads // group.size()), config.head_dim)
        self._cache = [
            [torch.zeros(shape, dtype=model.dtype).to(runtime.device) for _ in "kv"]
            for _ in model.model.layers
        ]

    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        ends: set[int],
        sampling: Sampling = GREEDY,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """The answer to each prompt of tokens, without the token of `ends` that ended it; any number of
        prompts.

        `on_token(prompt's number, token)` is told each token as it is chosen, an end too. Values of each step
        are read: the host waits for the device.
        """
        answers = []
        if (
            not self._runtime.executes
        ):  # graphs are collected, and no value may decide: a prefill and a decoding step each
            max_new_tokens, ends = 2, set()
        with _whole_sequences(self._model):
            for first in range(0, len(prompts), self.batch_size):
                batch = prompts[first : first + self.batch_size]
                choosers = [sampling.chooser(first + row) for row in range(len(batch))]
                answers += self._generate(
                    batch,
                    max_new_tokens,
                    ends,
                    choosers,
                    on_token and (lambda row, token, first=first: on_token(first + row, token)),
                )
        return answers

    def _generate(self, prompts, max_new_tokens, ends, choosers, on_token):
        answers: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        logits = self._prefill(prompts)
        for step in range(max_new_tokens):
            for row in sorted(going):
                token = choosers[row](prompts[row] + answers[row], logits[row])
                if on_token:
                    on_token(row, token)
                if token in ends:
                    going.remove(row)
                else:
                    answers[row].append(token)
            if not going or step + 1 == max_new_tokens:
                return answers
            # A row that has ended computes its last token again: the graph is for all rows.
            last = [(answer or prompt)[-1] for prompt, answer in zip(prompts, answers, strict=True)]
            logits = self._decode(
                last,
                [
                    len(prompt) + max(0, len(answer) - 1)
                    for prompt, answer in zip(prompts, answers, strict=True)
                ],
            )
        return answers

    @torch.no_grad()
    def _prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Begin with up to batch_size prompts: logits of the token after each, fp32 [batch_size, vocab_size]
        on the CPU."""
        bucket = bucket_of(max(map(len, prompts)), self.capacity)
        rows = prompts + [[0]] * (self.batch_size - len(prompts))
        ids = torch.tensor([row + [0] * (bucket - len(row)) for row in rows]).to(self._runtime.device)
        last = torch.tensor([len(row) - 1 for row in rows]).to(self._runtime.device)
        positions = torch.arange(bucket, device=ids.device).unsqueeze(0).expand(ids.shape)
        # One causal segment: padding stands at the end, where no token of the prompt sees it.
        masks = segment_masks(torch.ones_like(ids))

        def remember(cache, new):
            return new, F.pad(new, (0, 0, 0, 0, 0, 0, 0, self.capacity - bucket))

        return self._logits(ids, positions, masks, remember, last, f"prefill of {bucket}")

    @torch.no_grad()
    def _decode(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        """Go on with a token for each row, at its 0-based position: logits of the one after it, as of
        _prefill."""
        rest = [0] * (self.batch_size - len(tokens))
        ids = torch.tensor(tokens + rest).unsqueeze(1).to(self._runtime.device)
        place = torch.tensor(positions + rest).unsqueeze(1).to(self._runtime.device)
        slots = torch.arange(self.capacity, device=ids.device).unsqueeze(0)
        here = (slots == place).t()[:, :, None, None]  # [capacity, batch, 1, 1]

        def remember(cache, new):
            return [torch.where(here, new, cache)] * 2

        return self._logits(ids, place, [(slots <= place).unsqueeze(1)], remember, None, "decode")

    def _logits(self, ids, positions, masks, remember, last, place):
        """`remember(cache, new)`: the keys or values to attend to [sequence, batch, heads, head_dim], and
        those to be kept."""
        model, pipeline = self._model, self._model.pipeline
        rotary = rotary_cos_sin(positions.t(), model.rotary_frequencies)
        x = model.embed(ids)
        for stage in range(pipeline.group.size()):
            x = permute(x, pipeline.group, 1) if stage else x
            x = self._layers(
                x, *rotary, masks, remember, model.stage_index == stage if pipeline.group.size() > 1 else None
            )
        if last is not None:  # of a prompt only the last token's logits are asked for
            x = x.index_select(0, last * len(last) + torch.arange(len(last), device=last.device))
        logits = all_gather(
            model.head(x, len(ids)).squeeze(1), model.model.embed_tokens.parameter_group, -1
        ).float()
        self._runtime.mark_step(place)
        return logits.cpu() if self._runtime.executes else torch.zeros(logits.shape)

    def _layers(self, x, cos, sin, masks, remember, turn):
        """This stage's layers, which remember where `turn`, boolean [1] as data, is true, or None."""
        model = self._model
        for layer, caches in zip(model.model.layers, self._cache, strict=True):
            before, attention = x, layer.self_attn
            query, *both = attention.heads(layer.input_layernorm(x), cos, sin)
            seen = []
            for cache, new in zip(caches, both, strict=True):
                attended, kept = remember(cache, new)
                cache.copy_(kept if turn is None else torch.where(turn, kept, cache))
                seen.append(attended)
            x = x + attention.o_proj(attend(query, *seen, masks))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return model.pipeline.pass_by_spare(before, x, model.config.num_hidden_layers, model.stage_index)


@contextmanager
def _whole_sequences(model: Llama):
    """The model in evaluation, without sequence parallelism: a decoding step has one position, which cannot
    be divided."""
    divided = [module for module in model.modules() if getattr(module, "sequence_parallel_enabled", False)]
    training = model.training
    model.eval()
    for module in divided:
        module.sequence_parallel_enabled = False
    try:
        yield
    finally:
        model.train(training)
        for module in divided:
            module.sequence_parallel_enabled = True
