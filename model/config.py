"""config.json -> ModelConfig: what the architecture needs of it, checked."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from model.config_fields import DEFAULTS, NEUTRAL, WITHOUT_EFFECT
from model.weights.hub import read_json

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
CHECKED = ("model_type", "architectures", "hidden_act", "quantization_config")


@dataclass(frozen=True)
class ModelConfig:
    """What the architecture needs of a Hugging Face config.json; the fields have its names."""

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
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float

    @classmethod
    def from_pretrained(cls, directory: Path) -> "ModelConfig":
        """Read `directory`/config.json, as transformers 4 or 5 writes it, with LlamaConfig's defaults.

        Raises ValueError for what is no Llama, or one whose parts are not implemented, and for a field whose
        effect is not known.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise ValueError(f"{directory} has no config.json: a Hugging Face model directory was expected")
        settings = read_json(path)
        try:
            _check_architecture(settings)
            known = {*DEFAULTS, *ROPE, *CHECKED, *WITHOUT_EFFECT}
            _check_unknown({name: value for name, value in settings.items() if name not in known})
            values = {name: settings.get(name, default) for name, default in DEFAULTS.items()}
            if values["num_key_value_heads"] is None:
                values["num_key_value_heads"] = values["num_attention_heads"]
            if values["head_dim"] is None:
                for name in ("hidden_size", "num_attention_heads"):
                    _check_number(name, values[name], int)
                values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
            theta, scaling = _read_rope(settings)
            return cls(**values, rope_theta=theta, rope_scaling=scaling)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __post_init__(self):
        """Raise ValueError for values that no model can have."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):
                _check_number(field.name, value, field.type)
            elif field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}; true or false was expected")
        for key, value in (self.rope_scaling or {}).items():
            _check_number(f"rope_scaling.{key}", value, float)
        if (
            self.rope_scaling
            and self.rope_scaling["high_freq_factor"] <= self.rope_scaling["low_freq_factor"]
        ):
            raise ValueError(
                f"rope_scaling.high_freq_factor is {self.rope_scaling['high_freq_factor']}; more than the "
                f"low_freq_factor {self.rope_scaling['low_freq_factor']} was expected"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")


def _check_number(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless the value is a number above 0, of type `kind`: int or float."""
    if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
        raise ValueError(
            f"{name} is {value!r}; {'an integer' if kind is int else 'a number'} above 0 was expected"
        )


def _check_architecture(settings: dict) -> None:
    """Raise ValueError for what is no Llama with plain weights."""
    if settings.get("model_type") != "llama":
        raise ValueError(
            f"not the config of a known model architecture: model_type is {settings.get('model_type')!r}; "
            "markstep trains LlamaForCausalLM, whose is 'llama'"
            + (", and never runs code that comes with a model (auto_map)" if settings.get("auto_map") else "")
        )
    if (settings.get("architectures") or ["LlamaForCausalLM"]) != ["LlamaForCausalLM"]:
        raise ValueError(f"the architecture is {settings['architectures']}; markstep trains LlamaForCausalLM")
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {settings['hidden_act']!r}; Llama's is 'silu'")
    if settings.get("quantization_config"):
        raise ValueError("the model is quantized (quantization_config); plain weights are read")


def _check_unknown(values: dict[str, Any]) -> None:
    """Raise ValueError for the first field that is not off: what is ignored would train another model."""
    for name, value in values.items():
        if value and value != NEUTRAL.get(name.rsplit(".", 1)[-1]):
            raise ValueError(
                f"{name} is {str(value)[:80]!r}, which markstep does not compute; where it changes nothing, "
                "take it out of the file"
            )


def _read_rope(settings: dict) -> tuple[Any, dict[str, Any] | None]:
    """(rope_theta, llama3's scaling or None) of a config.json.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 both into rope_parameters. Where a file
    has both, the two versions read different ones, so they must agree.
    """
    thetas, scalings = {}, {}
    if "rope_theta" in settings:
        thetas["rope_theta"] = settings["rope_theta"]
    for form in ("rope_scaling", "rope_parameters"):
        values = settings.get(form) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{form} is {values!r}; an object was expected")
        if "rope_theta" in values:
            thetas[f"{form}.rope_theta"] = values["rope_theta"]
        if values:
            scalings[form] = _llama3_scaling(form, values)
    for found in (thetas, scalings):
        (first, one), *others = found.items() or [(None, None)]
        for name, other in others:
            if other != one:
                raise ValueError(f"{first} is {one} and {name} is {other}: which of them holds is not known")
    return next(iter(thetas.values()), 10000.0), next(iter(scalings.values()), None)


def _llama3_scaling(form: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """The parameters of llama3's scaling in rope_scaling or rope_parameters, whose name is `form`; None where
    its type is default."""
    kinds = {str(values[name]) for name in ("rope_type", "type") if values.get(name) is not None}
    kind = " or ".join(sorted(kinds or ["default"]))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{form} of type {kind!r}; 'llama3' or none is implemented")
    used = {"rope_type", "type", "rope_theta", *(LLAMA3_ROPE if kind == "llama3" else ())}
    _check_unknown({f"{form}.{key}": value for key, value in values.items() if key not in used})
    return {key: values.get(key) for key in LLAMA3_ROPE} if kind == "llama3" else None
