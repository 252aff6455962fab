"""LoRA adapters in peft's format: adapter_config.json and adapter_model.safetensors."""

import math
from pathlib import Path

import torch

from model.lora import LoraConfig
from model.weights.hub import read_json
from model.weights.sources import SafetensorsFiles
from parallel.shard import Shard

PEFT_PREFIX = "base_model.model."
# What changes the arithmetic of LoRA, or the base model under it.
UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # of init_lora_weights


def peft_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.lora_A.weight -> the name of that factor in adapter_model.safetensors."""
    return PEFT_PREFIX + name


def adapter_config(config: LoraConfig, base_model: str) -> dict:
    """The contents of peft's adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
    }


class PeftAdapter:
    """An adapter directory in peft's format: its LoraConfig as `config`, and its factors, read lazily by our
    names."""

    def __init__(self, directory: Path):
        path = Path(directory) / "adapter_config.json"
        if not path.is_file():
            raise ValueError(
                f"{directory} has no adapter_config.json: a directory saved by peft was expected"
            )
        values = read_json(path)
        unsupported = [key for key in UNSUPPORTED if values.get(key)]
        if str(values.get("init_lora_weights")).startswith(CHANGES_BASE):
            unsupported.append(f"init_lora_weights {values['init_lora_weights']}")
        if values.get("peft_type") != "LORA" or values.get("bias", "none") != "none" or unsupported:
            raise ValueError(
                f"{path}: only plain LoRA is read; here: {values.get('peft_type')}, bias "
                f"{values.get('bias')}, {', '.join(unsupported) or 'no other options'}"
            )
        rank, alpha, dropout = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout") or 0.0
        targets = values.get("target_modules")
        names = targets if isinstance(targets, list) else [targets]
        for name, good in (
            ("r", isinstance(rank, int) and rank > 0),
            ("target_modules", names and all(isinstance(each, str) and each for each in names)),
            ("use_rslora", values.get("use_rslora") in (None, False, True)),
            ("lora_alpha", isinstance(alpha, int | float) and 0 < alpha < math.inf),
            ("lora_dropout", isinstance(dropout, int | float) and 0 <= dropout < 1),
        ):
            if not good:
                raise ValueError(f"{path}: {name} is {values.get(name)!r}, which no LoRA can have")
        self._files = SafetensorsFiles(directory, "adapter_model")
        if (
            isinstance(targets, str)
            or values.get("exclude_modules")
            or values.get("layers_to_transform") is not None
        ):
            # A pattern, or not all of that name: the file says which modules these were.
            targets = {
                name.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0]
                for name in self._files.shapes
                if ".lora_" in name
            }
        self.config = LoraConfig(rank, alpha, dropout, tuple(sorted(targets)), bool(values.get("use_rslora")))

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the file holds exactly the factors `expected` (our names and global
        shapes)."""
        # peft saves the head's own weight beside the factors that are put on it.
        self._files.check(
            {peft_name(name): shape for name, shape in expected.items()}, (".base_layer.weight",)
        )

    def read(self, name: str, shard: Shard) -> torch.Tensor:
        return self._files.read(peft_name(name), shard.slices).float()
