"""Reads in what the layers of a config.json differ: windows of attention, and rotary embedding."""

from typing import Any

from model.config_fields import check_number

FULL, SLIDING = "full_attention", "sliding_attention"  # of layer_types
# Fields that are read into ModelConfig.windows and rotary_layers.
BY_LAYER = (
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "no_rope_layers",
    "no_rope_layer_interval",
)


def read_rotary_layers(by_layer: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """ModelConfig.rotary_layers."""
    if "no_rope_layers" not in by_layer:
        return ()
    rotates, interval = by_layer["no_rope_layers"], by_layer["no_rope_layer_interval"]
    if rotates is None:
        check_number("no_rope_layer_interval", interval, int)
        rotates = [(layer + 1) % interval != 0 for layer in range(layers)]
    _check_list("no_rope_layers", rotates, layers, (0, 1))
    return () if all(rotates) else tuple(bool(each) for each in rotates)


def read_windows(by_layer: dict[str, Any], rotary: tuple[bool, ...], layers: int) -> tuple[int, ...]:
    """ModelConfig.windows."""
    if "sliding_window" not in by_layer:
        return ()
    window, types = by_layer["sliding_window"], by_layer.get("layer_types")
    switch = by_layer.get("use_sliding_window", True)
    if not isinstance(switch, bool):
        raise ValueError(f"use_sliding_window is {switch!r}; true or false was expected")
    window = window if switch else None
    if window is not None:
        check_number("sliding_window", window, int)
    if types is not None:
        _check_list("layer_types", types, layers, (FULL, SLIDING))
        slides = [each == SLIDING for each in types]
        if any(slides) and window is None:
            raise ValueError(
                f"layer_types has {SLIDING}, but the window is off (use_sliding_window {switch}, "
                f"sliding_window {by_layer['sliding_window']}): which of them holds is not known"
            )
    elif window is None:
        return ()
    elif "max_window_layers" in by_layer:
        first = by_layer["max_window_layers"]
        if first != 0:
            check_number("max_window_layers", first, int)
        slides = [layer >= first for layer in range(layers)]
    elif "no_rope_layers" in by_layer:  # SmolLM3's layers without rotary embedding have the window
        slides = [not rotates for rotates in rotary or [True] * layers]
    else:
        slides = [True] * layers
    return tuple(window if each else 0 for each in slides) if any(slides) else ()


def _check_list(name: str, values: Any, layers: int, choices: tuple) -> None:
    """Raise ValueError unless the value is a list of `choices`, one for each layer."""
    if not isinstance(values, list) or len(values) != layers or any(each not in choices for each in values):
        raise ValueError(
            f"{name} is {str(values)[:80]}; a list of {layers} (num_hidden_layers) of {choices[0]!r} and "
            f"{choices[1]!r} was expected"
        )
