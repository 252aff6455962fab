"""The weights that a merge writes: trained weights, or the base model's with the LoRA update added."""

from collections.abc import Iterator
from typing import Protocol

import torch

from model.config import ModelConfig
from model.lora import lora_delta
from model.weights.hub import read_json
from model.weights.safetensors_file import bands
from model.weights.shapes import base_shapes
from tools.model_source import open_base
from trainer.checkpoint.reader import Checkpoint
from trainer.checkpoint.stored import BAND_BYTES

CONFIG = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WeightSource(Protocol):
    """A model's weights, read in bands so that no whole tensor is in memory.

    `shapes` has Hugging Face's name and the shape of every weight, in the model's order.
    """

    shapes: dict[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the weight has in the model."""

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """Consecutive bands of rows of the weight. Raises ValueError where the files are damaged."""


class TrainedWeights:
    """The weights of a checkpoint whose training updated all of them."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig):
        self.shapes, self._checkpoint = base_shapes(config), checkpoint
        settings = read_json(checkpoint.path / CONFIG)
        self._dtype = DTYPES.get(settings.get("dtype") or settings.get("torch_dtype"), torch.float32)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        return self._checkpoint.stream(name)


class AdaptedWeights:
    """The weights of the base model, with the checkpoint's LoRA update added in fp32 unless `base_only`.

    `device`: where the products of LoRA's factors are computed.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, model_id: str | None, base_only: bool, device: str
    ):
        self.shapes, self._checkpoint = base_shapes(config), checkpoint
        self._base_only, self._device = base_only, device
        self._base = open_base(checkpoint, config, model_id)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        shape, factors = self.shapes[name], self._lora_factors(name.removesuffix(".weight"))
        all_columns = tuple(slice(0, size) for size in shape[1:])
        for first, last in bands(shape, 4, BAND_BYTES):
            band = self._base.read(name, (slice(first, last), *all_columns))
            if factors:
                lora_a, lora_b = factors
                delta = lora_delta(lora_a, lora_b[first:last], self._checkpoint.lora)
                band = (band.to(self._device).float() + delta).cpu()
            yield band

    def _lora_factors(self, module: str) -> list[torch.Tensor] | None:
        """LoRA's A [r, in] and B [out, r] of the module, whole; None where it has no update."""
        if self._base_only or f"{module}.lora_A.weight" not in self._checkpoint.shapes:
            return None
        names = [f"{module}.lora_{letter}.weight" for letter in "AB"]
        return [torch.cat(list(self._checkpoint.stream(name))).to(self._device) for name in names]
