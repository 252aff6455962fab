"""In what the layers of a model differ, as data where the layers of pipeline stages do.

A layer may have a window, or not rotate queries and keys (ModelConfig.windows, rotary_layers). All stages
have one graph, so what the layers in one position of the stages have in common is known to the graph, and in
what they differ is a tensor. Layers that need the same masks and the same rotary angles share them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from model.attention.blockwise import block_size, segment_masks
from model.config import ModelConfig
from parallel.pipeline import Pipeline

EVERYTHING = 2**31 - 1  # the window, as data, of a layer that has none


class LayerKind(NamedTuple):
    """What the graph knows of a layer, the same on all stages.

    window: the most positions that a query sees, 0 for all before it; rotates: whether queries and keys are
    rotated; both of any stage's layer in this position. masks, rotary: which of StageInputs the layer takes.
    """

    window: int
    rotates: bool
    masks: int
    rotary: int


@dataclass
class StageInputs:
    """What the layers of a stage need to know about the tokens of a batch, by LayerKind.masks and rotary.

    rotary: (cos, sin), each fp32 [sequence, batch, 1, head_dim]. masks: those of segment_masks; None for
    flash attention, and with caches, which know what is seen. token_seeds: of LoRA's dropout, int32
    [sequence, batch], or None where nothing is dropped.
    """

    rotary: list[tuple[torch.Tensor, torch.Tensor]] | None
    masks: list[list[torch.Tensor]] | None
    token_seeds: torch.Tensor | None = None


class LayerKinds(nn.Module):
    """The LayerKind of each layer of this rank's stage, in `layers`, and the tensors of each kind."""

    def __init__(self, config: ModelConfig, pipeline: Pipeline):
        super().__init__()
        last = config.num_hidden_layers - 1
        positions = [
            # A padding layer is taken for the last one: what it computes is not used.
            tuple(config.of_layer(min(layer_id, last)) for layer_id in layer_ids)
            for layer_ids in zip(*pipeline.layer_ids_of_stages(config.num_hidden_layers), strict=True)
        ]
        windows = [_common(window for window, _ in layers) for layers in positions]
        rotates = [_common(rotates for _, rotates in layers) for layers in positions]
        self._windows = list(dict.fromkeys(windows))
        # The first is that of all layers that rotate, or do not, on all stages.
        self._rotates = list(dict.fromkeys([(True,), *(each for each in rotates if len(each) > 1)]))
        self.layers = [
            LayerKind(
                0 if 0 in window else max(window),
                any(rotates),
                self._windows.index(window),
                self._rotates.index(rotates) if len(rotates) > 1 else 0,
            )
            for window, rotates in zip(windows, rotates, strict=True)
        ]
        stage = pipeline.group.rank()
        own = [each[stage % len(each)] or EVERYTHING for each in self._windows]
        self.register_buffer("windows", torch.tensor(own, dtype=torch.int32), persistent=False)
        own = [each[stage % len(each)] for each in self._rotates]
        self.register_buffer("rotates", torch.tensor(own), persistent=False)

    def masks(self, segment_ids: torch.Tensor) -> list[list[torch.Tensor]]:
        """StageInputs.masks of rows [batch, sequence]."""
        block = block_size(segment_ids.shape[1])
        return [segment_masks(segment_ids, block, *each) for each in self._limits()]

    def seen(self, slots: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        """Of each kind of masks, which slots of a cache, by position, queries at these positions see."""
        found = []
        for window, own in self._limits():
            seen, limit = slots <= positions, window if own is None else own
            found.append(seen & (positions - slots < limit) if window or own is not None else seen)
        return found

    def _limits(self):
        """(LayerKind.window; this stage's window as data, int32 [1], where stages differ) of each kind."""
        return [
            (0 if 0 in kind else max(kind), self.windows[number : number + 1] if len(kind) > 1 else None)
            for number, kind in enumerate(self._windows)
        ]

    def rotary(self, cos: torch.Tensor, sin: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """StageInputs.rotary: where this stage's layers of a kind do not rotate, cos is 1 and sin is 0."""
        found = [(cos, sin)]
        for number in range(1, len(self._rotates)):
            rotates = self.rotates[number : number + 1]
            still = torch.ones_like(cos), torch.zeros_like(sin)
            found.append(tuple(torch.where(rotates, *each) for each in zip((cos, sin), still, strict=True)))
        return found


def _common(values) -> tuple:
    """The value of each stage; one where all have the same."""
    values = tuple(values)
    return values if len(set(values)) > 1 else values[:1]
