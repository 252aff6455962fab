"""Environment variables that would change numbers or graphs behind the program: they are taken away.

To be called before torch and torch_xla are imported: both read some of them when they are loaded. The names
were found in torch_xla 2.9, PyTorch 2.9 and AWS's documentation of the Neuron SDK.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping

OFF = ("", "0", "false", "no", "off")
BF16 = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16")  # in AWS's and Hugging Face's tutorials they stand for bf16
ASKED = "MARKSTEP_BF16"  # keeps that BF16 was asked for, in this process and in those that it starts

_PRECISION = "products of fp32 would be computed in bf16"
_OPERATIONS = "torch_xla would record other operations"
_SHARDING = "torch_xla would divide tensors over the devices by itself"
CHANGES = {
    **dict.fromkeys(BF16, "all that is fp32 would be bf16: master weights, moments and the loss too"),
    "XLA_USE_32BIT_LONG": "64-bit integers would have 32 bits",
    "XLA_RNG_BIT_GENERATOR": "other random numbers would be drawn",
    "XLA_NO_SPECIAL_SCALARS": _OPERATIONS,
    "XLA_DISABLE_FUNCTIONALIZATION": _OPERATIONS,
    "XLA_EXPERIMENTAL": _OPERATIONS,
    "XLA_ALWAYS_ALLREDUCE": _OPERATIONS,
    "XLA_LAYOUTS": "tensors would be laid out in another order",
    "XLA_USE_SPMD": _SHARDING,
    "XLA_AUTO_SPMD": _SHARDING,
    "XLA_USE_EAGER_DEBUG_MODE": "each operation would be a graph of its own",
    "ONEDNN_DEFAULT_FPMATH_MODE": _PRECISION,
    "DNNL_DEFAULT_FPMATH_MODE": _PRECISION,
    "NEURON_RT_STOCHASTIC_ROUNDING_EN": "every cast to bf16 would be rounded at random, that of fp32 master "
    "weights too; --stochastic_rounding asks for it",
    "NEURON_RT_DBG_CC_STOCHASTIC_ROUNDING_EN": "sums over ranks would be rounded at random",
    "NEURON_ENABLE_NOSEED_DROPOUT": "torch-neuronx would draw other dropout masks",
    "NEURON_ENABLE_INT_MATMUL_DOWNCAST": "products of integers would be computed in a lower precision",
}


def is_on(value: str | None) -> bool:
    """Whether a variable of this value asks for something."""
    return (value or "").strip().lower() not in OFF


def asks_for_bf16(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the environment asks for what --bf16 does: the default of that flag."""
    environment = os.environ if environment is None else environment
    return any(is_on(environment.get(name)) for name in (ASKED, *BF16))


def take_away(environment: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """Remove the variables of CHANGES from the environment, and say so on stderr; returns those that were on.

    Where one of BF16 was on, `asks_for_bf16` stays true. One process of each machine says it.
    """
    environment = os.environ if environment is None else environment
    bf16 = asks_for_bf16(environment)
    found = {name: environment.pop(name) for name in CHANGES if name in environment}
    found = {name: value for name, value in found.items() if is_on(value)}
    if bf16:
        environment[ASKED] = "1"
    if environment.get("LOCAL_RANK", "0") == "0":
        for name, value in found.items():
            print(
                f"warning: {name}={value} is taken out of the environment: {meaning(name)}", file=sys.stderr
            )
    return found


def meaning(name: str) -> str:
    """What a variable of CHANGES would do, and what it is taken for."""
    read_as = "; it is read as --bf16: bf16 weights, with fp32 master weights" if name in BF16 else ""
    return CHANGES[name] + read_as
