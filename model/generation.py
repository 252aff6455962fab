"""Text generation: forward passes with a cache of keys and values, and the choice of the next token.

Shapes are static. A batch of prompts is padded to a bucket's length. Each bucket has one graph for its
prefill, and one graph serves all decoding steps: the position of a row in its sequence is data, and what the
host chooses from the logits is no part of a graph. Every rank gathers the logits of the whole vocabulary and
chooses by the same rule and seeds, so all choose the same token.

A batch passes the stages of a pipeline as a whole, one stage after the other. Whose turn it is is data. The
other stages compute, too, but do not write to their caches.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.attention.blockwise import segment_masks
from model.attention.rotary import rotary_cos_sin
from model.cache import CacheUpdate
from model.decoder_layer import LayerInputs
from model.linear import ReplacesLinear
from model.llama import Llama
from parallel.collectives import all_gather, permute
from parallel.mesh import Group
from parallel.runtime import Runtime

SMALLEST_BUCKET = 32
ROUNDED_TO = 64  # capacities, so that runs whose lengths differ a little share their graphs
MOST_ROWS = 128  # of a product that is faster with the weight first


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
            f"a prompt of {longest_prompt} tokens and --max_new_tokens {max_new_tokens} are more than the "
            "model's "
            f"positions (max_position_embeddings {positions}): shorten one of them"
        )
    return -(-needed // ROUNDED_TO) * ROUNDED_TO


class WeightFirst(ReplacesLinear):
    """Within this context F.linear of an x [rows, features] of up to MOST_ROWS rows is computed as weight
    times x^T. On a CPU it takes as little as a third of the time.

    With x on the left, XLA:CPU's library copies the weight into another order first, number by number; and
    of one row XLA makes a loop that is not vectorised.
    """

    @staticmethod
    def linear(x, weight, bias=None):
        if len(x) > MOST_ROWS or len(weight) % 2:
            return F.linear(x, weight, bias)
        # In halves: a plain product and its transpose XLA would turn into the product with x on the left.
        y = (weight @ x.t()).unflatten(0, (2, -1)).permute(2, 0, 1).flatten(1)
        return y if bias is None else y + bias


class Generator:
    """A model with a cache for `batch_size` sequences of up to `capacity` tokens.

    Each rank of `group`, and of all stages, has one. It needs and changes nothing of training: the model may
    be one that is being trained.
    """

    def __init__(self, runtime: Runtime, model: Llama, group: Group, batch_size: int, capacity: int):
        self.batch_size, self.capacity = batch_size, capacity
        self._runtime, self._model = runtime, model
        config = model.config
        self._kv_heads = max(1, config.num_key_value_heads // group.size())
        rows = batch_size * self._kv_heads
        shapes = (rows, config.head_dim, capacity), (rows, capacity, config.head_dim)
        self._caches = [
            tuple(torch.zeros(shape, dtype=model.dtype).to(runtime.device) for shape in shapes)
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
        """The completion of each prompt, without the token of `ends` that ended it. Prompts and completions
        are token ids.

        `on_token(prompt's number, token)` is called for each token as it is chosen, also for one that ends a
        completion. The host waits for the device at every token.
        """
        completions = []
        if not self._runtime.executes:
            # Graphs are only collected, and no value may decide anything: one prefill and one decoding step.
            max_new_tokens, ends = 2, set()
        with _whole_sequences(self._model):
            for first in range(0, len(prompts), self.batch_size):
                batch = prompts[first : first + self.batch_size]
                choosers = [sampling.chooser(first + row) for row in range(len(batch))]
                on_row = on_token and (lambda row, token, first=first: on_token(first + row, token))
                completions += self._generate(batch, max_new_tokens, ends, choosers, on_row)
        return completions

    def _generate(self, prompts, max_new_tokens, ends, choosers, on_token):
        completions: list[list[int]] = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        logits = self._prefill(prompts)
        for step in range(max_new_tokens):
            for row in sorted(unfinished):
                token = choosers[row](prompts[row] + completions[row], logits[row])
                if on_token:
                    on_token(row, token)
                if token in ends:
                    unfinished.remove(row)
                else:
                    completions[row].append(token)
            if not unfinished or step + 1 == max_new_tokens:
                return completions
            # A row that has ended computes its last token again: the graph is for all rows.
            pairs = list(zip(prompts, completions, strict=True))
            last_tokens = [(completion or prompt)[-1] for prompt, completion in pairs]
            positions = [len(prompt) + max(0, len(completion) - 1) for prompt, completion in pairs]
            logits = self._decode(last_tokens, positions)
        return completions

    def _prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Begin with up to batch_size prompts: the logits of the token after each, fp32 [batch_size,
        vocab_size] on the CPU."""
        bucket = bucket_of(max(map(len, prompts)), self.capacity)
        rows = prompts + [[0]] * (self.batch_size - len(prompts))
        input_ids = torch.tensor([row + [0] * (bucket - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        return self._run(f"prefill of {bucket}", self._prefill_graph, input_ids, last)

    def _decode(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        """Continue with one token for each row, at its 0-based position: the logits of the next one, as
        _prefill's."""
        rest = [0] * (self.batch_size - len(tokens))
        input_ids, position_ids = (torch.tensor(values + rest).unsqueeze(1) for values in (tokens, positions))
        return self._run("decode", self._decode_graph, input_ids, position_ids)

    def _run(self, name, graph, *inputs):
        on_device = [tensor.to(self._runtime.device) for tensor in inputs]
        logits = self._runtime.mark_step(name, graph, *on_device)
        return logits.cpu() if self._runtime.executes else torch.zeros(logits.shape)

    @torch.no_grad()
    def _prefill_graph(self, input_ids, last):
        """input_ids [batch, bucket]; last [batch], the position of each prompt's last token."""
        positions = (
            torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0).expand(input_ids.shape)
        )
        # One causal segment: padding stands at the end, where no token of the prompt sees it.
        masks = segment_masks(torch.ones_like(input_ids))
        with WeightFirst():
            x = self._stages(input_ids, positions, None, masks)
            # Of a prompt only the last token's logits are needed.
            x = x.index_select(0, last * len(last) + torch.arange(len(last), device=last.device))
            return self._logits(x, len(input_ids))

    @torch.no_grad()
    def _decode_graph(self, input_ids, position_ids):
        """input_ids and position_ids [batch, 1]."""
        slots = torch.arange(self.capacity, device=input_ids.device).unsqueeze(0)
        position_of_head = position_ids.expand(-1, self._kv_heads).flatten().unsqueeze(1)
        masks = [(slots <= position_of_head).unsqueeze(1)]
        with WeightFirst():
            x = self._stages(input_ids, position_ids, slots == position_of_head, masks)
            return self._logits(x, len(input_ids))

    def _stages(self, input_ids, positions, write_slots, masks):
        """The output of the last stage, x [tokens, features]; the last two are CacheUpdate's."""
        model, stages = self._model, self._model.pipeline.group
        x = model.embed(input_ids)
        inputs = LayerInputs(*rotary_cos_sin(positions.t(), model.rotary_frequencies), None)
        for stage in range(stages.size()):
            x = permute(x, stages, 1) if stage else x
            is_turn = model.stage_index == stage if stages.size() > 1 else None
            updates = [CacheUpdate(cache, write_slots, masks, is_turn) for cache in self._caches]
            x = model.stage(x, inputs, updates)
        return x

    def _logits(self, x, batch):
        """x [batch, features] -> fp32 [batch, vocab_size] on all ranks."""
        logits = self._model.head(x, batch).squeeze(1)
        gathered = all_gather(logits, self._model.vocabulary_group, -1).float()
        vocab_size = self._model.config.vocab_size
        # A vocabulary that the ranks do not divide has padding behind its end.
        return gathered if gathered.shape[-1] == vocab_size else gathered[:, :vocab_size]


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
