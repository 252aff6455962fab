"""LoRA adapters in peft's format: adapter_config.json and adapter_model.safetensors."""

import math
from pathlib import Path

import torch

from model.lora import LoraConfig
from model.weights.hub import read_json
from model.weights.sources import SafetensorsFiles
from parallel.shard import Shard

PEFT_PREFIX = "base_model.model."
# Options that change the arithmetic of LoRA, or the base model under it.
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
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # values of init_lora_weights


def peft_name(name: str) -> str:
    """The name in adapter_model.safetensors of a factor such as model.norm.lora_A.weight."""
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
    """An adapter directory in peft's format: its LoraConfig as `config`, and its factors, read on demand.

    Raises ValueError where the directory has no adapter, or one that is not plain LoRA.
    """

    def __init__(self, directory: Path):
        path = Path(directory) / "adapter_config.json"
        if not path.is_file():
            raise ValueError(
                f"{directory} has no adapter_config.json: a directory saved by peft was expected"
            )
        values = read_json(path)
        _check_supported(path, values)
        _check_values(path, values)
        self._files = SafetensorsFiles(directory, "adapter_model")
        targets = values["target_modules"]
        if (
            isinstance(targets, str)
            or values.get("exclude_modules")
            or values.get("layers_to_transform") is not None
        ):
            # A pattern, or not all modules of a name: the names of the factors say which modules these were.
            targets = {
                name.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0]
                for name in self._files.shapes
                if ".lora_" in name
            }
        self.config = LoraConfig(
            values["r"],
            values["lora_alpha"],
            values.get("lora_dropout") or 0.0,
            tuple(sorted(targets)),
            bool(values.get("use_rslora")),
        )

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the file holds exactly the factors `expected`, with finite numbers.

        expected: {our name: global shape}.
        """
        # Where the head has factors, peft saves its base weight too.
        self._files.check(
            {peft_name(name): shape for name, shape in expected.items()}, (".base_layer.weight",)
        )
        for name, shape in expected.items():
            self.read(name, Shard(shape))

    def read(self, name: str, shard: Shard) -> torch.Tensor:
        """The slice `shard` of the factor of our `name`, fp32."""
        return self._files.read_finite(peft_name(name), shard.slices).float()


def _check_supported(path: Path, values: dict) -> None:
    """Raise ValueError where the adapter is anything but plain LoRA."""
    unsupported = [key for key in UNSUPPORTED if values.get(key)]
    if str(values.get("init_lora_weights")).startswith(CHANGES_BASE):
        unsupported.append(f"init_lora_weights {values['init_lora_weights']}")
    if values.get("peft_type") != "LORA" or values.get("bias", "none") != "none" or unsupported:
        raise ValueError(
            f"{path}: only plain LoRA is read; here: {values.get('peft_type')}, bias "
            f"{values.get('bias')}, {', '.join(unsupported) or 'no other options'}"
        )


def _check_values(path: Path, values: dict) -> None:
    """Raise ValueError for settings that no LoRA can have."""
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
