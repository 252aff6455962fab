"""config.json -> ModelConfig: what Llama and its relatives need of it, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from model.attention.rope_settings import ORIGINAL, ROPE, read_rope
from model.config_fields import DEFAULTS, REFUSED, WITHOUT_EFFECT, check_number, check_unknown
from model.config_layers import BY_LAYER, FULL, SLIDING, read_rotary_layers, read_windows
from model.weights.hub import read_json


class Architecture(NamedTuple):
    """How a model type differs from Llama: a row of ARCHITECTURES.

    class_name: transformers' class. defaults: of the fields of config.json that it reads besides
    model.config_fields.DEFAULTS, or that begin with another value, as transformers' config class has them.
    always: the values of ModelConfig that no field switches. ignored: fields that its files have, and its
    class does not read.
    """

    class_name: str
    defaults: Mapping[str, Any]
    always: Mapping[str, Any] = MappingProxyType({})
    ignored: tuple[str, ...] = ()


_BIASES = {"attention_bias": False, "mlp_bias": False}
_WINDOWS = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,  # from this layer on a layer has the window, where layer_types says nothing
    "layer_types": None,
}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
} | _WINDOWS
# A relative begins with a row here. What it computes is a field of ModelConfig; the model reads no other.
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", _BIASES),
    # Attention to the last `sliding_window` positions.
    "mistral": Architecture(
        "MistralForCausalLM",
        {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    # Biases of queries, keys and values; windows from a layer on, or by layer. Qwen2.5 is a Qwen2.
    "qwen2": Architecture("Qwen2ForCausalLM", _QWEN, {"qkv_bias": True}),
    # A norm of each head's query and key, before they are rotated; a head_dim of its own.
    "qwen3": Architecture(
        "Qwen3ForCausalLM", _QWEN | {"head_dim": 128, "attention_bias": False}, {"qk_norm": True}
    ),
    # Factors of embeddings, of scores and of what is added to the residual, and a divisor of logits.
    "granite": Architecture(
        "GraniteForCausalLM",
        _BIASES
        | {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    # Layers without rotary embedding: every fourth, or those that no_rope_layers has a 0 for.
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        _BIASES
        | {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        ignored=("max_window_layers",),
    ),
}
CHECKED = ("model_type", "architectures", "hidden_act", "quantization_config")


@dataclass(frozen=True)
class ModelConfig:
    """What the model needs of a Hugging Face config.json; the first fields have its names.

    qkv_bias: queries, keys and values have biases, also where attention_bias, which gives the output one too,
    is off. qk_norm: each head's query and key have an RMSNorm. attention_multiplier: of the scores; None is
    1 / sqrt(head_dim). windows: of each layer, how many positions a query sees, its own included; 0 for all
    before it; () where no layer has a window. rotary_layers: of each layer, whether queries and keys are
    rotated; () where all are.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    initializer_range: float
    attention_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    windows: tuple[int, ...] = ()
    rotary_layers: tuple[bool, ...] = ()

    @classmethod
    def from_pretrained(cls, directory: Path) -> "ModelConfig":
        """Read `directory`/config.json; errors name the file."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise ValueError(f"{directory} has no config.json: a Hugging Face model directory was expected")
        settings = read_json(path)
        try:
            return cls.from_settings(settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "ModelConfig":
        """The contents of a config.json, as transformers 4 or 5 writes it, with the defaults of its class.

        Raises ValueError for a model that is not in ARCHITECTURES, or one whose parts are not implemented,
        and for a field whose effect is not known.
        """
        row = _architecture(settings)
        defaults = DEFAULTS | row.defaults
        known = {*defaults, *ROPE, *CHECKED, *WITHOUT_EFFECT, *row.ignored}
        check_unknown({name: value for name, value in settings.items() if name not in known})
        values = {name: settings.get(name, default) for name, default in defaults.items()}
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            check_number(name, values[name], int)
        if values["head_dim"] is None:
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        default_theta = values.pop("rope_theta", 10000.0)
        theta, scaling = read_rope(settings, default_theta, values)
        by_layer = {name: values.pop(name) for name in BY_LAYER if name in values}
        rotary = read_rotary_layers(by_layer, values["num_hidden_layers"])
        windows = read_windows(by_layer, rotary, values["num_hidden_layers"])
        return cls(
            **values,
            **row.always,
            model_type=settings["model_type"],
            rope_theta=theta,
            rope_scaling=scaling,
            rotary_layers=rotary,
            windows=windows,
        )

    def __post_init__(self):
        """Raise ValueError for values that no model can have."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) or field.name == "attention_multiplier" and value is not None:
                check_number(field.name, value, int if field.type is int else float)
            elif field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}; true or false was expected")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")

    @property
    def attention_scale(self) -> float:
        """What the scores of attention are multiplied with."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def positions_field(self) -> str:
        """The field that limits the positions of a row, or of a prompt with its answer.

        Beyond longrope's original length transformers takes other frequencies, also for the positions before
        it, and for all rows of a batch: such rows are refused.
        """
        is_longrope = (self.rope_scaling or {}).get("rope_type") == "longrope"
        return ORIGINAL if is_longrope else "max_position_embeddings"

    @property
    def max_positions(self) -> int:
        """The most positions of a row, or of a prompt with its answer."""
        original = self.rope_scaling[ORIGINAL] if self.positions_field == ORIGINAL else math.inf
        return min(self.max_position_embeddings, original)

    def of_layer(self, layer_id: int) -> tuple[int, bool]:
        """(window, whether queries and keys are rotated) of a layer of the whole model."""
        return (
            self.windows[layer_id] if self.windows else 0,
            self.rotary_layers[layer_id] if self.rotary_layers else True,
        )

    def settings(self) -> dict[str, Any]:
        """A config.json that is read as this one."""
        row = ARCHITECTURES[self.model_type]
        sizes = {name: getattr(self, name) for name in DEFAULTS | row.defaults if hasattr(self, name)}
        sizes.pop("rope_theta", None)
        found = {
            **sizes,
            "model_type": self.model_type,
            "architectures": [row.class_name],
            "rope_parameters": {**(self.rope_scaling or {}), "rope_theta": self.rope_theta},
            "use_sliding_window": bool(self.windows),
            "sliding_window": max(self.windows, default=0) or None,
            "layer_types": [SLIDING if window else FULL for window in self.windows] or None,
            "no_rope_layers": [int(rotates) for rotates in self.rotary_layers] or None,
        }
        unread = {name for name in BY_LAYER if name not in row.defaults}
        return {name: value for name, value in found.items() if name not in unread}


def _architecture(settings: dict) -> Architecture:
    """The row of a config.json; raises ValueError for what is none of ARCHITECTURES with plain weights."""
    kind = settings.get("model_type")
    known = ", ".join(row.class_name for row in ARCHITECTURES.values())
    if kind in REFUSED:
        raise ValueError(
            f"model_type is {kind!r}: markstep does not compute {REFUSED[kind]}; it trains {known}"
        )
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"not the config of a known model architecture: model_type is {kind!r}; markstep trains {known}, "
            f"whose are {', '.join(ARCHITECTURES)}"
            + (", and never runs code that comes with a model (auto_map)" if settings.get("auto_map") else "")
        )
    row = ARCHITECTURES[kind]
    if (settings.get("architectures") or [row.class_name]) != [row.class_name]:
        raise ValueError(
            f"the architecture is {settings['architectures']}; of model_type {kind!r} markstep trains "
            f"{row.class_name}"
        )
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {settings['hidden_act']!r}; that of these models is 'silu'")
    if settings.get("quantization_config"):
        raise ValueError("the model is quantized (quantization_config); plain weights are read")
    return row
