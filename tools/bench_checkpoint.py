"""Merging and loading measured: merge_checkpoint beside `cp` and beside the naive way, and a rank's memory
while it loads.

    python -m tools.bench_checkpoint DIRECTORY [--layers 24] [--rounds 3]

DIRECTORY gets a checkpoint of a full training in fp32, as 8 tensor parallel ranks save it: 4.4 GB with 24
layers, without the optimizer's moments, which a merge does not read. Each side is a process of its own,
writes the same number of bytes to the same disk, and waits until they are on the disk; imports are not timed.
The sides alternate; ratios are those within a round.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tools import cli

ROOT = Path(__file__).resolve().parent.parent
RANKS = 8
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}


def make_checkpoint(directory: Path, layers: int) -> Path:
    """Write checkpoint-1 with random weights, one rank after the other to save memory; returns its path."""
    from data.loader import Position
    from model.config import ModelConfig
    from model.llama import Llama
    from parallel.buckets import Buckets
    from parallel.mesh import Mesh
    from parallel.runtime import Runtime
    from parallel.shard import named_shards
    from trainer.checkpoint import writer as saving
    from trainer.checkpoint.late_files import LateFiles
    from trainer.config import Config
    from trainer.config_derived import SAMPLE
    from trainer.prompts import PromptFormat
    from trainer.tokenizer import load_tokenizer

    base, partial = directory / "base", directory / "checkpoint-1.incomplete"
    base.mkdir(parents=True)
    partial.mkdir()
    (base / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": layers}))
    job = SimpleNamespace(
        config=Config(output_dir=str(directory / "unused")),
        model_directory=base,
        model_reference=str(base),
        tokenizer=load_tokenizer(SAMPLE / "tiny"),
        prompt_format=PromptFormat.of("plain"),
        resume=None,
        identity={"base": "", "lora": None, "seed": 0, "data": ""},
    )
    saving.KINDS = ("parameter",)
    for rank in range(RANKS):
        mesh = Mesh.create(rank, RANKS, RANKS)
        buckets = Buckets(list(named_shards(Llama(ModelConfig.from_pretrained(base), mesh.tp))), mesh)
        saver = saving.Saver(Runtime(rank, RANKS, None), mesh, job, SimpleNamespace(buckets=buckets))
        generator = torch.Generator().manual_seed(rank)
        values = [
            torch.ones(shape)
            if not bucket.decays
            else torch.empty(shape).normal_(0, 0.02, generator=generator)
            for bucket, shape in zip(buckets.buckets, buckets.shapes, strict=True)
        ]
        saver._write(partial, [values])
    saver.runtime.rank = 0
    saver._late = LateFiles(partial, range(RANKS), str)
    saver._complete(
        partial, Position(1, 0, 0), None, SimpleNamespace(is_alive=lambda: True), time.perf_counter()
    )
    return directory / "checkpoint-1"


def copy(checkpoint: Path, output: Path) -> None:
    """Copy the ranks' files with cp."""
    output.mkdir()
    files = sorted(checkpoint.glob("rank-*"))
    subprocess.run(["cp", *files, output], check=True)
    subprocess.run(["sync", *(output / file.name for file in files)], check=True)


def merge(checkpoint: Path, output: Path) -> None:
    from tools.merge_checkpoint.merging import merge

    merge(checkpoint, output)


def naive(checkpoint: Path, output: Path) -> None:
    """Load the files of all ranks, concatenate the tensors, and save them."""
    from safetensors.torch import load_file, save_file

    output.mkdir()
    tensors = json.loads((checkpoint / "manifest.json").read_text())["tensors"]
    ranks = [load_file(path) for path in sorted(checkpoint.glob("rank-*"))]
    whole = {}
    for key, values in tensors.items():
        shape = list(values["global_shape"])
        if values["dim"] is not None:
            shape[values["dim"]] //= values["parts"]
        parts = [rank[key].view(shape) for rank in ranks if key in rank]
        whole[key.removeprefix("parameter/")] = (
            torch.cat(parts, values["dim"]) if len(parts) > 1 else parts[0]
        )
    save_file(whole, output / "model.safetensors", metadata={"format": "pt"})
    subprocess.run(["sync", output / "model.safetensors"], check=True)


def load(model: Path, _) -> None:
    """Load a merged model as rank 3 of 8 does before training, with the CPU as its device."""
    from model.config import ModelConfig
    from model.llama import Llama
    from model.weights.loading import fill
    from model.weights.sources import SafetensorsFiles
    from parallel.mesh import Mesh

    sharded = Llama(ModelConfig.from_pretrained(model), Mesh.create(3, RANKS, RANKS).tp).requires_grad_(False)
    fill(sharded, SafetensorsFiles(model), "cpu", seed=0)


SIDES = {function.__name__: function for function in (copy, merge, naive, load)}


def measure(side: str, source: Path, output: Path) -> tuple[float, float]:
    """(seconds, most MB of memory that were added to those of the imports) of a side in its own process."""
    flags = [source.resolve(), "--side", side, "--output", output.resolve()]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_checkpoint", *flags],
        cwd=ROOT,  # the folder where the user stands may have a file tools.py
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def run_side(side: str, source: Path, output: Path) -> None:
    """Run a side in this process, and print what measure() returns."""
    import transformers  # noqa: F401

    import tools.merge_checkpoint.merging  # noqa: F401

    before, begun = peak_memory(), time.perf_counter()
    SIDES[side](source, output)
    seconds = time.perf_counter() - begun
    print(json.dumps([seconds, peak_memory() - before]))


def peak_memory() -> float:
    """The most MB of memory that this process has had, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3


def main() -> int:
    """The tool; returns its exit status."""
    parser = cli.parser("bench_checkpoint", __doc__)
    parser.add_argument(
        "directory",
        type=cli.path,
        help="where some 15 GB are written, and deleted at the end; must not exist",
    )
    parser.add_argument("--layers", type=int, default=24, help="default 24")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=cli.path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        run_side(chosen.side, chosen.directory, chosen.output)
        return 0
    checkpoint, output = make_checkpoint(chosen.directory, chosen.layers), chosen.directory / "output"
    size = sum(path.stat().st_size for path in checkpoint.glob("rank-*"))
    print(
        f"a checkpoint of {size / 1e9:.2f} GB in {RANKS} files; {chosen.rounds} rounds, medians (min - max)"
    )
    found = {side: [] for side in ("copy", "merge", "naive")}
    for number in range(chosen.rounds):
        for side in list(found)[:: -1 if number % 2 else 1]:
            found[side].append(measure(side, checkpoint, output))
            shutil.rmtree(output)
    for side, values in found.items():
        seconds, memory = np.array(values).T
        speed = np.sort(np.array(found["copy"])[:, 0] / seconds)
        print(
            f"{side:<8} {np.median(seconds):6.2f} s   {size / 1e9 / np.median(seconds):5.2f} GB/s   speed "
            "to cp "
            f"{np.median(speed):.2f} ({speed[0]:.2f} - {speed[-1]:.2f})   at most {memory.max():6.0f} MB"
        )
    measure("merge", checkpoint, output)
    seconds, memory = measure("load", output, output)
    print(
        f"load     {seconds:6.2f} s   at most {memory:6.0f} MB, and 1/{RANKS} of the model is "
        f"{size / RANKS / 1e6:.0f} MB"
    )
    shutil.rmtree(chosen.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
