"""Files that a walk reads: a base model with random weights, in several files, and a tokenizer."""

import json
import shutil
from pathlib import Path

import torch

from model.config import ModelConfig
from model.weights.safetensors_file import TensorWriter
from model.weights.shapes import base_shapes

TINY = Path(__file__).resolve().parent.parent.parent / "data" / "sample" / "tiny"
LAYERS, HEADS, FILES = 4, 8, 8
BYTES = 12  # of a checkpoint, for a parameter: fp32 weight and two moments
STD = 0.02  # of the weights


def write_model(directory: Path, checkpoint_bytes: float) -> int:
    """Write a Llama whose checkpoint of a full training has about so many bytes; returns its parameters.

    Its layers are as wide as needed, in multiples of 64: of width h, each has 13 h^2 parameters.
    """
    width = 64 * max(1, round((checkpoint_bytes / BYTES / LAYERS / 13) ** 0.5 / 64))
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    file = directory / "config.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text())
            | {
                "hidden_size": width,
                "intermediate_size": 3 * width,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": HEADS,
                "head_dim": width // HEADS,
            }
        )
    )
    return _write_weights(directory, base_shapes(ModelConfig.from_pretrained(directory)))


def _write_weights(directory: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    names, listed = list(shapes), {}
    for number in range(FILES):
        own, file = names[number::FILES], f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        writer = TensorWriter(directory / file, {name: (torch.bfloat16, shapes[name]) for name in own}, {})
        for name in own:
            generator = torch.Generator().manual_seed(names.index(name))
            values = torch.ones(shapes[name])
            if len(shapes[name]) > 1:
                values.normal_(0, STD, generator=generator)
            writer.write(name, values.bfloat16())
        writer.close()
        listed |= dict.fromkeys(own, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return sum(torch.Size(shape).numel() for shape in shapes.values())
