"""An NVIDIA GPU as a device of torch_xla: finds its driver and JAX's PJRT plugin, checks both, and registers
the plugin.

torch_xla 2.9 has no CUDA of its own, but takes a plugin that speaks its version of the PJRT C API
(https://github.com/openxla/xla/blob/main/xla/pjrt/c/pjrt_c_api.h). It names devices after the plugin's
platform, and aborts where that is "cuda": so the platform is called "gpu" here. Nothing of this needs torch
before `register`.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from parallel.graph import backend

PACKAGE = "jax-cuda12-pjrt==0.7.1"  # the plugin whose version of the API is torch_xla 2.9's
API = (0, 75)
CUDA = 12  # of the plugin; a driver of a newer one runs it, too
PLUGIN, DRIVER = "PJRT_LIBRARY_PATH", "libcuda.so.1"
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # JAX's name
DEFAULT_FRACTION = 0.92
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
GIB = 2**30

# PJRT_Api: its size, the first extension, the version (its size, an extension, major and minor as int32),
# then pointers to functions, to which newer versions append.
VERSION, FUNCTIONS = 32, 40  # bytes from the beginning
PLATFORM_NAME = 12  # the function's number


class Gpu(NamedTuple):
    """What the driver says: the card's name, bytes of memory in all and free, its own CUDA version."""

    name: str
    total: int
    free: int
    cuda: tuple[int, int]


def find_plugin() -> Path:
    """The plugin's library: that of PJRT_LIBRARY_PATH, else the installed one. Raises ValueError."""
    if given := os.environ.get(PLUGIN):
        if not Path(given).is_file():
            raise ValueError(f"{PLUGIN}={given}: no such file; the library of a PJRT plugin was expected")
        return Path(given)
    package = find_spec("jax_plugins")
    for folder in package.submodule_search_locations if package else ():
        for found in sorted(Path(folder).glob("xla_cuda*/xla_cuda_plugin.so")):
            return found
    raise ValueError(
        f'PJRT_DEVICE=GPU, and no PJRT plugin for CUDA is installed: `pip install -e ".[gpu]"` in the '
        f"repository's directory, or {PLUGIN}=FILE"
    )


def load_plugin(path: Path) -> int:
    """Load the plugin's library, and return the address of its PJRT_Api.

    Raises ValueError where it is no PJRT plugin, or one of another version than torch_xla's.
    """
    try:
        function = ctypes.CDLL(str(path)).GetPjrtApi
    except (OSError, AttributeError) as error:
        raise ValueError(f"{path} is no PJRT plugin that can be loaded: {error}") from None
    function.restype = ctypes.c_void_p
    api = function()
    found = tuple((ctypes.c_int32 * 2).from_address(api + VERSION)) if api else ()
    size = ctypes.c_size_t.from_address(api).value if api else 0
    if found != API or size <= FUNCTIONS + 8 * PLATFORM_NAME:
        raise ValueError(
            f"{path} has version {'.'.join(map(str, found))} of the PJRT C API, and torch_xla 2.9 has "
            f"{'.'.join(map(str, API))}: pip install {PACKAGE}"
        )
    return api


def rename_platform(api: int) -> object:
    """Let the plugin at this address call its platform "gpu"; keep what is returned as long as the plugin."""
    name = ctypes.create_string_buffer(b"gpu")

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t))
    def platform_name(arguments):
        # PJRT_Client_PlatformName_Args: size, extension, client, and as results the name and its length
        arguments[3], arguments[4] = ctypes.addressof(name), len(name.value)
        return None  # no error

    slot = ctypes.c_void_p.from_address(api + FUNCTIONS + 8 * PLATFORM_NAME)
    slot.value = ctypes.cast(platform_name, ctypes.c_void_p).value
    return platform_name, name


def look() -> Gpu:
    """The first GPU that CUDA_VISIBLE_DEVICES lets this process see; ValueError where there is none."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise ValueError(
            f"PJRT_DEVICE=GPU, and {DRIVER} of NVIDIA's driver is not there: a machine with an NVIDIA GPU "
            "and its driver was expected (in a container: docker run --gpus all); PJRT_DEVICE=CPU runs on "
            "this CPU"
        ) from None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    number, version = ctypes.c_int(), ctypes.c_int()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuInit", 0)
    _call(driver, "cuDeviceGetCount", ctypes.byref(number))
    if not number.value:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ValueError(f"the driver shows no GPU (CUDA_VISIBLE_DEVICES={shown})")
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    _call(driver, "cuCtxPushCurrent_v2", context)
    _call(driver, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    _call(driver, "cuCtxPopCurrent_v2", ctypes.byref(context))
    _call(driver, "cuDevicePrimaryCtxRelease_v2", device)
    cuda = version.value // 1000, version.value % 1000 // 10
    return Gpu(name.value.decode(), total.value, free.value, cuda)


def _call(driver: ctypes.CDLL, function: str, *arguments) -> None:
    """Call a function of the driver (https://docs.nvidia.com/cuda/cuda-driver-api); ValueError where it
    fails."""
    status = getattr(driver, function)(*arguments)
    if status == OUT_OF_MEMORY:
        raise ValueError(f"the GPU has no memory left at all: {_WHO}")
    if status:
        raise ValueError(
            f"NVIDIA's driver does not work: {function} returns {status}; `nvidia-smi` should list the GPU"
        )


_WHO = "end the other programs on it (nvidia-smi lists them), or choose another GPU by CUDA_VISIBLE_DEVICES"


def memory_fraction() -> float:
    """The part of the GPU's memory that a run takes at its start; raises ValueError."""
    given = os.environ.get(FRACTION) or DEFAULT_FRACTION
    try:
        fraction = float(given)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise ValueError(f"{FRACTION}={given}: a number above 0 and up to 1 was expected")
    return fraction


def check() -> Gpu:
    """Look at plugin, driver and memory, before anything is compiled; returns the GPU.

    Raises ValueError of one line where a run on it could not start. A process takes one GPU: from here on it
    sees the first one of CUDA_VISIBLE_DEVICES alone.
    """
    load_plugin(find_plugin())
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    gpu, fraction = look(), memory_fraction()
    if gpu.cuda[0] < CUDA:
        raise ValueError(
            f"NVIDIA's driver is one of CUDA {gpu.cuda[0]}.{gpu.cuda[1]}; the plugin needs {CUDA} or newer"
        )
    if gpu.free < fraction * gpu.total:
        raise ValueError(
            f"the GPU ({gpu.name}) has {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free, and a run "
            f"takes {fraction:.0%} of it: {_WHO}, or set {FRACTION} to a smaller part"
        )
    return gpu


@contextmanager
def naming_memory() -> Iterator[None]:
    """Within this context, XLA's error for want of memory on the device is a MemoryError of one line."""
    try:
        yield
    except RuntimeError as error:
        _, found, what = str(error).partition("RESOURCE_EXHAUSTED: ")
        if not found:
            raise
        raise MemoryError(
            f"the GPU's memory is too small for this run ({what.splitlines()[0].rstrip('.')}): "
            "--gradient_checkpointing, fewer rows (--per_device_train_batch_size) or shorter ones need less"
        ) from error


def register() -> None:
    """Make the plugin the one of PJRT_DEVICE=GPU, and start it. To be called before the first tensor is on a
    device. Raises OSError of one line where the plugin cannot use the GPU.

    Products of fp32 are computed in fp32, where XLA on a GPU would round their factors to TF32.
    """
    import torch_xla
    from torch_xla.experimental import plugins

    path = find_plugin()

    class Plugin(plugins.DevicePlugin):
        kept = rename_platform(load_plugin(path))

        def library_path(self):
            return str(path)

        def configure_single_process(self):
            """Nothing: torch_xla asks for it where torchrun has started one process."""

        def client_create_options(self):
            # JAX's names: the memory is taken at the start, as a whole
            return {"platform_name": "cuda", "memory_fraction": memory_fraction(), "preallocate": True}

    plugins.use_dynamic_plugins()
    plugins.register_plugin("GPU", Plugin())
    backend.multiply_in_full_precision()
    try:
        torch_xla.device()
    except RuntimeError as error:
        raise OSError(f"{path} cannot use the GPU: {str(error).splitlines()[0]}") from None
