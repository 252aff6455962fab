"""Run a function of a test module on N ranks, in a process of its own (XLA's world is fixed once per
process)."""

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def on_ranks(function, world_size: int, **arguments) -> list:
    """[function(runtime, **arguments) of rank 0, of rank 1, ...]; what it returns is moved by torch.save."""
    import torch

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "results.pt"
        command = [
            sys.executable,
            "-m",
            "tests.support.on_ranks",
            function.__module__,
            function.__name__,
            str(world_size),
            json.dumps(arguments),
            str(out),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-6000:]
        return torch.load(out, weights_only=False)


def _main(module: str, name: str, world_size: str, arguments: str, out: str) -> None:
    from parallel.runtime import launch, prepare_environment

    prepare_environment(int(world_size))
    import torch

    function = getattr(importlib.import_module(module), name)
    results = [None] * int(world_size)

    def program(runtime):
        results[runtime.rank] = function(runtime, **json.loads(arguments))

    launch(program, int(world_size))
    torch.save(results, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
