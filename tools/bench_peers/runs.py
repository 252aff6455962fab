"""Runs each side of the comparison in a process of its own, and reads what it measured."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from parallel.runtime import on_gpu
from tools.bench_peers.inputs import FILES

ROOT = Path(__file__).resolve().parent.parent.parent
SIDES = {
    "markstep": "markstep, packed",
    "plain_cuda": "plain loop on torch, the same rows",
    "trl": "trl, packed (bfd)",
    "trl_padded": "trl, padded to the maximum",
    "plain": "plain loop on torch_xla, full rows",
}
NEEDS = {
    "markstep": (),
    "plain_cuda": ("peft",),
    "trl": ("trl", "accelerate", "peft"),
    "trl_padded": ("trl", "accelerate", "peft"),
    "plain": ("peft",),
}
CUDA = "import torch; print(torch.ones(2, device='cuda').sum().item())"


def sides_here() -> list[str]:
    """The sides of this machine's device."""
    return ["markstep", "plain_cuda", "trl"] if on_gpu() else ["markstep", "trl", "trl_padded", "plain"]


def missing(side: str, python: str = sys.executable) -> list[str]:
    """What a side needs and this Python does not have: packages, and on a GPU torch's own CUDA."""
    names = NEEDS[side]
    if not on_gpu() or side == "markstep":
        return [name for name in names if find_spec(name) is None]
    found = _ask(
        python, f"from importlib.util import find_spec as f; print(*[n for n in {names} if not f(n)])"
    )
    return found.split() + ([] if _ask(python, CUDA) == "2.0" else ["a torch that finds CUDA"])


def _ask(python: str, program: str) -> str:
    """What a program prints; nothing where it fails."""
    done = subprocess.run([python, "-c", program], env=_environment(python), capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _environment(python: str) -> dict[str, str]:
    """This process's, without what is meant for another Python than `python`."""
    others = () if python == sys.executable else ("PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", *others)}


def run(
    side: str, directory: Path, settings: dict, huge_pages: bool = False, python: str = sys.executable
) -> dict:
    """Run a side on the inputs in `directory`, a peer by `python`, and return what it measured.

    Raises ValueError with the end of its stderr where it fails.
    """
    python = sys.executable if side == "markstep" else python
    environment = _environment(python) | {
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "USE_TORCH_XLA": "0",  # transformers and accelerate would take the XLA device
    }
    result = directory / "markstep.json"
    if side == "markstep":
        steps = ["--steps", settings["steps"], "--warmup", settings["warmup"], "--json", result]
        program = ["tools.bench_step", *steps, *flags_of(directory, settings)]
    else:
        peer = ["tools.bench_peers.cuda"] if side == "plain_cuda" else ["tools.bench_peers.peers", side]
        program = [*peer, directory]
        environment |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge_pages else {}
    done = subprocess.run(
        [python, "-m", *map(str, program)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{side} ended with status {done.returncode}: {done.stderr.strip()[-1500:]}")
    if side == "markstep":
        return json.loads(result.read_text(encoding="utf-8"))
    return json.loads(done.stdout.splitlines()[-1])


def flags_of(directory: Path, settings: dict) -> list:
    """The flags with which markstep trains the model on the examples."""
    return ["--model_id", directory, "--random_weights", *_flags_of_the_step(directory, settings)]


def step_instructions(directory: Path, settings: dict) -> int:
    """The number of HLO instructions in markstep's step, all micro-batches included, by
    tools.bench_compile."""
    result, model = directory / "graph.json", directory / "config.json"
    flags = map(str, _flags_of_the_step(directory, settings))
    subprocess.run(
        [sys.executable, "-m", "tools.bench_compile", "--model", model, "--json", result, *flags],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    graphs = json.loads(result.read_text(encoding="utf-8"))["graphs"]
    times = {"micro_batch": settings["rows"] // settings["micro_batch"]}
    return sum(times.get(name, 1) * graph["instructions"] for name, graph in graphs.items())


def _flags_of_the_step(directory: Path, settings: dict) -> list:
    return [
        *("--dataset", directory / FILES["data"]),
        *("--data_cache_dir", directory / FILES["tokens"]),
        *("--max_seq_length", settings["row_length"]),
        *("--per_device_train_batch_size", settings["micro_batch"]),
        *("--gradient_accumulation_steps", settings["rows"] // settings["micro_batch"]),
        *("--lora_r", 16),
        *("--lora_alpha", 32),
        *("--lr_scheduler_type", "constant"),
        *("--bf16", "true" if settings["bf16"] else "false"),  # whatever the environment asks for
        *("--gradient_checkpointing", settings["gradient_checkpointing"]),
    ]
