"""Reads the settings of the rotary embedding from a config.json: its base, and how it is scaled."""

from typing import Any

from model.config_fields import check_number, check_unknown

ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
ORIGINAL = "original_max_position_embeddings"
# The numbers that a type of scaling needs, and those that may be left out. rotary.py computes each type.
NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL),
    "longrope": ("short_factor", ORIGINAL),
}
OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor", "long_factor"),
}


def read_rope(
    settings: dict[str, Any], default_theta: float, sizes: dict[str, Any]
) -> tuple[Any, dict[str, Any] | None]:
    """(rope_theta, scaling or None) of a config.json. A scaling has its rope_type and what that reads.

    `sizes` has head_dim and max_position_embeddings. transformers 4 writes rope_theta and rope_scaling,
    transformers 5 both into rope_parameters. Where a file has both, the two versions read different ones, so
    they must agree.
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
            scalings[form] = _scaling(form, values, settings, sizes)
    for found in (thetas, scalings):
        (first, one), *others = found.items() or [(None, None)]
        for name, other in others:
            if other != one:
                raise ValueError(f"{first} is {one} and {name} is {other}: which of them holds is not known")
    scaling = next(iter(scalings.values()), None)
    if (scaling or {}).get("rope_type") != "longrope":  # the only type that reads it beside rope_scaling
        check_unknown({ORIGINAL: settings.get(ORIGINAL)})
    return next(iter(thetas.values()), default_theta), scaling


def _scaling(form, values, settings, sizes) -> dict[str, Any] | None:
    """The scaling in `form`, which is rope_scaling or rope_parameters; None where its type is default."""
    kinds = {str(values[name]) for name in ("rope_type", "type") if values.get(name) is not None}
    kind = " or ".join(sorted(kinds or ["default"]))
    if kind not in ("default", *NEEDED):
        why = ", whose frequencies change with the longest row of a batch" if kind == "dynamic" else ""
        raise ValueError(
            f"{form} of type {kind!r}{why}; {', '.join(map(repr, NEEDED))} or none is implemented"
        )
    names = (*NEEDED.get(kind, ()), *OPTIONAL.get(kind, ()))
    used = {"rope_type", "type", "rope_theta", *names}
    check_unknown({f"{form}.{key}": value for key, value in values.items() if key not in used})
    if kind == "default":
        return None
    found = {"rope_type": kind} | {key: values[key] for key in names if values.get(key) is not None}
    if kind == "yarn":  # what transformers takes where the file has none
        defaults = {"beta_fast": 32, "beta_slow": 1, ORIGINAL: sizes["max_position_embeddings"]}
        found = defaults | found
    if kind == "longrope":
        _complete_longrope(form, found, settings, sizes)
    _check(form, found, sizes["head_dim"])
    return found


def _complete_longrope(form: str, found: dict[str, Any], settings: dict, sizes: dict) -> None:
    """Add the original length and the factor where they are not in the scaling itself.

    transformers 4 reads the original length beside rope_scaling only, and derives the factor from it;
    transformers 5 reads it within, too, and prefers the factor of the file.
    """
    beside, within = settings.get(ORIGINAL), found.get(ORIGINAL)
    if beside and within and beside != within or form == "rope_scaling" and within and not beside:
        raise ValueError(
            f"{ORIGINAL} is {beside} and {form}.{ORIGINAL} is {within}: which of them holds is not known"
        )
    most = sizes["max_position_embeddings"]
    original = beside or within or most
    check_number(ORIGINAL, original, int)
    found[ORIGINAL] = original
    if not (beside or within):
        check_number(f"{form}.factor", found.get("factor"), float)
    ratio = most / original
    disagree = form == "rope_scaling" and beside and found.setdefault("factor", ratio) != ratio
    if disagree and "attention_factor" not in found:
        raise ValueError(
            f"{form}.factor is {found['factor']} and max_position_embeddings / {ORIGINAL} is {ratio}: "
            "which of them holds is not known"
        )
    found.setdefault("factor", ratio)


def _check(form: str, found: dict[str, Any], head_dim: Any) -> None:
    """Raise ValueError for a setting that is missing, or that no scaling can have."""
    kind = found["rope_type"]
    for key in NEEDED[kind]:
        if key not in found:
            raise ValueError(f"{form}.{key} is None; scaling of type {kind!r} needs it")
    for key, value in found.items():
        if key in ("short_factor", "long_factor"):
            check_number("head_dim", head_dim, int)
            if not isinstance(value, list) or len(value) != head_dim // 2:
                raise ValueError(
                    f"{form}.{key} is {str(value)[:80]}; a list of {head_dim // 2} numbers (head_dim / 2) "
                    "was expected"
                )
            for number, each in enumerate(value):
                check_number(f"{form}.{key}[{number}]", each, float)
        elif key == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"{form}.truncate is {value!r}; true or false was expected")
        elif key != "rope_type":
            check_number(f"{form}.{key}", value, float)
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in found and high in found and found[high] <= found[low]:
            raise ValueError(f"{form}.{high} is {found[high]}; more than the {low} {found[low]} was expected")
