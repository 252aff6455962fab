"""Runs each side of the comparison in a process of its own, and reads what it measured."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tools.bench_peers.inputs import FILES

ROOT = Path(__file__).resolve().parent.parent.parent
SIDES = {
    "markstep": "markstep, packed",
    "trl": "trl, packed (bfd)",
    "trl_padded": "trl, padded to the maximum",
    "plain": "plain loop on torch_xla, full rows",
}
NEEDS = {
    "markstep": (),
    "trl": ("trl", "accelerate", "peft"),
    "trl_padded": ("trl", "accelerate", "peft"),
    "plain": ("peft",),
}


def missing(side: str) -> list[str]:
    """The packages that a side needs and that are not installed."""
    return [name for name in NEEDS[side] if find_spec(name) is None]


def run(side: str, directory: Path, settings: dict, huge_pages: bool = False) -> dict:
    """Run a side on the inputs in `directory`, and return what it measured.

    Raises ValueError with the end of its stderr where it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    result = directory / "markstep.json"
    if side == "markstep":
        steps = ["--steps", settings["steps"], "--warmup", settings["warmup"], "--json", result]
        program = ["tools.bench_step", *steps, *flags_of(directory, settings)]
    else:
        program = ["tools.bench_peers.peers", side, directory]
        environment |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge_pages else {}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, program)], cwd=ROOT, env=environment, capture_output=True, text=True
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
    """The number of HLO instructions in markstep's step, by tools.bench_compile."""
    result, model = directory / "graph.json", directory / "config.json"
    flags = map(str, _flags_of_the_step(directory, settings))
    subprocess.run(
        [sys.executable, "-m", "tools.bench_compile", "--model", model, "--json", result, *flags],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return json.loads(result.read_text(encoding="utf-8"))["graphs"]["step"]["instructions"]


def _flags_of_the_step(directory: Path, settings: dict) -> list:
    return [
        *("--dataset", directory / FILES["data"]),
        *("--data_cache_dir", directory / FILES["tokens"]),
        *("--max_seq_length", settings["row_length"]),
        *("--per_device_train_batch_size", settings["rows"]),
        *("--lora_r", 16),
        *("--lora_alpha", 32),
        *("--lr_scheduler_type", "constant"),
        *("--bf16", "false"),  # whatever the environment asks for: the peers train in fp32
    ]
