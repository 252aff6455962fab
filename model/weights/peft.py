"""LoRA adapters in peft's format: adapter_config.json and adapter_model.safetensors."""

import math
from pathlib import Path

import torch

from model.lora import LoraConfig
from model.weights.hub import read_json
from model.weights.sources import SafetensorsFiles
from parallel.shard import Shard

PEFT_PREFIX, EMBEDDING = "base_model.model.", "embed_tokens"
# Settings that are read, or that only say where the adapter comes from and how its factors began. All others
# have to be off: they change the arithmetic of LoRA, or what it is added to.
KNOWN = frozenset(
    (
        "peft_type",
        "task_type",
        "peft_version",
        "auto_mapping",
        "runtime_config",
        "inference_mode",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "bias",
        "fan_in_fan_out",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "corda_config",
        "qalora_group_size",
        "megatron_core",
    )
)
# Values of init_lora_weights that leave the base weights and the arithmetic as they are.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
MERGE = "merge it into its base model with peft, and train from what that writes"


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
        self.directory = Path(directory)
        path = self.directory / "adapter_config.json"
        if not path.is_file():
            raise ValueError(
                f"{directory} has no adapter_config.json: a directory saved by peft was expected"
            )
        values = read_json(path)
        _check_supported(path, values)
        _check_values(path, values)
        self._files = SafetensorsFiles(directory, "adapter_model")
        _check_tensors(directory, self._files)
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

    def headers(self) -> dict[str, tuple[int, str]]:
        """As SafetensorsFiles.headers."""
        return self._files.headers()

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
    """Raise ValueError where the adapter is anything but plain LoRA of linear layers."""
    for key in ("modules_to_save", "trainable_token_indices"):
        if values.get(key):
            raise ValueError(
                f"{path}: {key} is {str(values[key])[:80]}: the adapter has more than LoRA's factors, such "
                f"as the rows of added tokens; {MERGE}"
            )
    targets = values.get("target_modules")
    if isinstance(targets, list) and any(str(each).endswith(EMBEDDING) for each in targets):
        raise ValueError(f"{path}: {EMBEDDING} is a target, and only linear layers are trained here; {MERGE}")
    unsupported = [f"{key} {str(value)[:40]}" for key, value in values.items() if value and key not in KNOWN]
    if values.get("init_lora_weights") not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights {values['init_lora_weights']}")
    if values.get("peft_type") != "LORA" or values.get("bias", "none") != "none" or unsupported:
        raise ValueError(
            f"{path}: only plain LoRA is read; here: {values.get('peft_type')}, bias "
            f"{values.get('bias')}, {', '.join(unsupported) or 'no other options'}"
        )


def _check_tensors(directory: Path, files: SafetensorsFiles) -> None:
    """Raise ValueError for factors of the embedding, and for whole weights that peft saves beside the factors
    where tokens were added."""
    for name, shape in files.shapes.items():
        if name.endswith((f"{EMBEDDING}.weight", "lm_head.weight")) or ".lora_embedding_" in name:
            raise ValueError(
                f"{directory}: the adapter holds {name} {list(shape)}: its embedding or head is not the base "
                f"model's, as where tokens were added; {MERGE}"
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
