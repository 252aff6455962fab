"""Text generation: forward passes with a cache of keys and values, and the choice of the next token.

Shapes are static. A batch of prompts is padded to a bucket's length. Each bucket has one graph for its
prefill, and one graph serves all decoding steps: the position of a row in its sequence is data. The graph
chooses the most probable tokens, and the next step starts with them before the host has read them. What is
drawn, or has a penalty, the host chooses from the logits. Every rank gathers the logits of the whole
vocabulary and chooses by the same rule and seeds, so all choose the same token.

A batch passes the stages of a pipeline as a whole, one stage after the other. Whose turn it is is data. The
other stages compute, too, but do not write to their caches.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from model.attention.blockwise import block_size, segment_masks
from model.attention.rotary import rotary_cos_sin
from model.cache import CacheUpdate
from model.decoder_layer import LayerInputs
from model.llama import Llama
from model.sampling import GREEDY, Sampling
from parallel.collectives import all_gather, permute
from parallel.mesh import Group
from parallel.runtime import Runtime

SMALLEST_BUCKET = 32
ROUNDED_TO = 64  # capacities, so that runs whose lengths differ a little share their graphs
MOST_ROWS = 128  # of a product that is faster with the weight first


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


class WeightFirst(TorchFunctionMode):
    """Within this context F.linear of an x [rows, features] of up to MOST_ROWS rows is computed as weight
    times x^T. On a CPU it takes as little as a third of the time.

    With x on the left, XLA:CPU's library copies the weight into another order first, number by number; and
    of one row XLA makes a loop that is not vectorised.
    """

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return (self._linear if function is F.linear else function)(*arguments, **(keywords or {}))

    @staticmethod
    def _linear(x, weight, bias=None):
        if len(x) > MOST_ROWS or len(weight) % 2:
            return F.linear(x, weight, bias)
        # In halves: a plain product and its transpose XLA would turn into the product with x on the left.
        y = (weight @ x.t()).unflatten(0, (2, -1)).permute(2, 0, 1).flatten(1)
        return y if bias is None else y + bias


class Step(NamedTuple):
    """What a graph returns, on the device: the `logits` of the next tokens, fp32 [batch, vocab_size], the
    most probable `tokens` [batch, 1], and the `positions` [batch, 1] at which they stand."""

    logits: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor


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
                on_row = on_token and (lambda row, token, first=first: on_token(first + row, token))
                choosers = [sampling.chooser(first + row) for row in range(len(batch))]
                choosers = None if sampling.is_greedy else choosers
                completions += self._generate(batch, max_new_tokens, ends, choosers, on_row)
        return completions

    def _generate(self, prompts, max_new_tokens, ends, choosers, on_token):
        """As generate, for up to batch_size prompts; without `choosers` the device chooses."""
        completions: list[list[int]] = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        step = self._prefill(prompts)
        for left in reversed(range(max_new_tokens)):
            # Started before the tokens are read: the host works while the device does.
            following = self._decode(step.tokens, step.positions) if left and not choosers else None
            tokens = self._read(step.logits if choosers else step.tokens)
            for row in sorted(unfinished):
                token = (
                    choosers[row](prompts[row] + completions[row], tokens[row])
                    if choosers
                    else int(tokens[row])
                )
                if on_token:
                    on_token(row, token)
                if token in ends:
                    unfinished.remove(row)
                else:
                    completions[row].append(token)
            if not unfinished or not left:
                return completions
            step = following or self._decode_chosen(completions, step.positions)
        return completions

    def _prefill(self, prompts: list[list[int]]) -> Step:
        """Begin with up to batch_size prompts."""
        bucket = bucket_of(max(map(len, prompts)), self.capacity)
        rows = prompts + [[0]] * (self.batch_size - len(prompts))
        input_ids = torch.tensor([row + [0] * (bucket - len(row)) for row in rows])
        last = torch.tensor([[len(row) - 1] for row in rows])
        on_device = [tensor.to(self._runtime.device) for tensor in (input_ids, last)]
        return self._runtime.mark_step(f"prefill of {bucket}", self._prefill_graph, *on_device)

    def _decode(self, tokens: torch.Tensor, positions: torch.Tensor) -> Step:
        """Continue with one token of each row, at its 0-based position; both [batch, 1] on the device.

        A row that has ended is computed on: the graph is for all rows.
        """
        return self._runtime.mark_step("decode", self._decode_graph, tokens, positions)

    def _decode_chosen(self, completions: list[list[int]], positions: torch.Tensor) -> Step:
        """_decode with the last token of each completion."""
        last = [completion[-1] if completion else 0 for completion in completions]
        rows = torch.tensor(last + [0] * (self.batch_size - len(last))).unsqueeze(1)
        return self._decode(rows.to(self._runtime.device), positions)

    def _read(self, tensor):
        """A tensor on the CPU, for which the host waits; zeros where nothing is executed."""
        return tensor.cpu() if self._runtime.executes else torch.zeros(tensor.shape, dtype=tensor.dtype)

    @torch.no_grad()
    def _prefill_graph(self, input_ids, last):
        """input_ids [batch, bucket]; last [batch, 1], the position of each prompt's last token."""
        positions = (
            torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0).expand(input_ids.shape)
        )
        # One causal segment: padding stands at the end, where no token of the prompt sees it.
        block = block_size(input_ids.shape[1])
        masks = segment_masks(torch.ones_like(input_ids), block)
        with WeightFirst():
            x = self._stages(input_ids, positions, None, masks)
            # Of a prompt only the last token's logits are needed.
            rows = last.flatten() * len(last) + torch.arange(len(last), device=last.device)
            return self._step(x.index_select(0, rows), last)

    @torch.no_grad()
    def _decode_graph(self, input_ids, position_ids):
        """input_ids and position_ids [batch, 1]."""
        slots = torch.arange(self.capacity, device=input_ids.device).unsqueeze(0)
        position_of_head = position_ids.expand(-1, self._kv_heads).flatten().unsqueeze(1)
        masks = [(slots <= position_of_head).unsqueeze(1)]
        with WeightFirst():
            x = self._stages(input_ids, position_ids, slots == position_of_head, masks)
            return self._step(x, position_ids)

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

    def _step(self, x, positions):
        """The Step after x [batch, features], which is at positions [batch, 1]; the same on all ranks."""
        logits = self._model.head(x, len(positions)).squeeze(1)
        logits = all_gather(logits, self._model.vocabulary_group, -1).float()
        if (
            logits.shape[-1] > self._model.config.vocab_size
        ):  # the padding of a vocabulary that is not divided
            logits = logits[:, : self._model.config.vocab_size]
        return Step(logits, logits.argmax(-1, keepdim=True), positions + 1)


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
