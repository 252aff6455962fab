"""LoRA's settings of a run: those of the flags, or of the adapter that it goes on from."""

import re
from math import prod

from model.config import ModelConfig
from model.llama import Llama
from model.lora import LoraConfig
from model.weights.hub import resolve
from model.weights.peft import PeftAdapter
from model.weights.shapes import base_shapes, trained_shapes
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from trainer.config import ALL_LINEAR, Config

FLAG = "--lora_target_modules"


def lora_config(config: Config, model_config: ModelConfig) -> LoraConfig | None:
    """The LoRA settings of the flags; None where all weights are trained.

    Raises ValueError for targets that the model does not have.
    """
    if not config.lora_r:
        return None
    targets = _targets(config.lora_target_modules.strip(), model_config)
    lora = LoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout, targets, config.use_rslora)
    return _checked(FLAG, model_config, lora)


def read_adapter(config: Config, model_config: ModelConfig) -> PeftAdapter | None:
    """The adapter of --adapter_name_or_path; raises ValueError for one that this model cannot have."""
    if not config.adapter_name_or_path:
        return None
    directory = resolve(config.adapter_name_or_path, "--adapter_name_or_path")
    adapter = PeftAdapter(directory)
    adapter.check(trained_shapes(model_config, _checked(str(directory), model_config, adapter.config)))
    return adapter


def count_parameters(model_config: ModelConfig, lora: LoraConfig | None) -> tuple[int, int]:
    """(trained parameters, all parameters) of the whole model, LoRA's factors included."""
    trained = sum(map(prod, trained_shapes(model_config, lora).values()))
    return trained, trained + (sum(map(prod, base_shapes(model_config).values())) if lora else 0)


def trained_summary(model_config: ModelConfig, lora: LoraConfig | None) -> str:
    """A line that says how much of the model is trained."""
    trained, parameters = count_parameters(model_config, lora)
    if not lora:
        return f"trained: all {parameters:,} parameters"
    # model.layers.0.self_attn.q_proj.lora_A.weight
    kinds = sorted({name.split(".")[-3] for name in trained_shapes(model_config, lora)})
    share = f"{trained:,} of {parameters:,} parameters ({trained / parameters:.3%})"
    return f"trained: {share}: LoRA of rank {lora.r} on {', '.join(kinds)}"


def _targets(text: str, model_config: ModelConfig) -> tuple[str, ...]:
    """Names of modules, or their last parts: of a list with commas, or as peft reads a text that is none.

    For peft, all-linear is every linear layer but the head, and another text a regular expression that a
    module's whole name matches.
    """
    if text.lower() == "all-linear":
        text = ALL_LINEAR
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError(f"{FLAG} names no module; pass --lora_r 0 to train without LoRA")
    if all(re.fullmatch(r"[\w.]+", name) for name in names):
        return names
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"{FLAG} {text}: neither names nor a regular expression: {error}") from None
    found = [
        (name, module) for name, module in Llama(model_config).named_modules() if pattern.fullmatch(name)
    ]
    for name, module in found:
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            raise ValueError(
                f"{FLAG} {text}: it matches {name or 'the whole model'}, which is no linear layer"
            )
    if not found:
        raise ValueError(
            f"{FLAG} {text}: as a regular expression, it matches the whole name of no module; one is "
            "model.layers.0.self_attn.q_proj"
        )
    return tuple(name for name, _ in found)


def _checked(source: str, model_config: ModelConfig, lora: LoraConfig) -> LoraConfig:
    """`lora`, where the model has its targets; else a ValueError that names the `source` of the settings."""
    try:
        trained_shapes(model_config, lora)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return lora
