"""The run whose start is checked, and what a check finds."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.config import Config

STATE_BYTES = 12  # a trained parameter's weight and two moments, in a checkpoint


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what was found, and how to mend it unless it is as it should be."""

    level: Literal["error", "warning", "ok"]
    what: str
    mend: str = ""


@dataclass(frozen=True)
class Plan:
    """The run to come: its flags, the processes on each node, its phase, and what its model needs.

    phase: precompile or train. model_files, model_bytes: number and size of the base's safetensors files.
    checkpoint_bytes: size of a checkpoint. These three are 0 where the model is a hub id, which may not be on
    this machine. bucket_bytes: size of the gradients in one collective.
    """

    config: Config
    nproc: int
    nnodes: int = 1
    phase: str = "train"
    model_files: int = 0
    model_bytes: int = 0
    checkpoint_bytes: int = 0
    bucket_bytes: int = 0

    @property
    def world(self) -> int:
        """The ranks of all nodes together."""
        return self.nproc * self.nnodes


def plan_of(config: Config, nproc: int, nnodes: int, phase: str) -> Plan:
    """The plan of a run, with the sizes of a model that is a directory: nothing is downloaded to know them.

    Raises ValueError where the directory holds no Llama, or the flags give LoRA no module.
    """
    directory, plan = Path(config.model_directory), Plan(config, nproc, nnodes, phase)
    try:
        from model.config import ModelConfig
        from model.weights.shapes import trained_shapes
        from parallel.buckets import BUCKET_BYTES
        from trainer.lora_settings import lora_config
    except ImportError:  # that torch or torch-xla is missing is a finding
        return plan
    if not directory.is_dir():
        return replace(plan, bucket_bytes=BUCKET_BYTES)
    files = [] if config.random_seed is not None else list(directory.glob("*.safetensors"))
    model_config = ModelConfig.from_pretrained(directory)
    shapes = trained_shapes(model_config, lora_config(config, model_config))
    elements = sum(math.prod(shape) for shape in shapes.values())
    return replace(
        plan,
        model_files=len(files),
        model_bytes=sum(file.stat().st_size for file in files),
        checkpoint_bytes=STATE_BYTES * elements,
        bucket_bytes=BUCKET_BYTES,
    )
