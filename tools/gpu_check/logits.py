"""The logits of a checkpoint, LoRA not merged, or of a merged model, on the device of PJRT_DEVICE.

    python -m tools.gpu_check.logits --checkpoint CKPT | --model MERGED FILE.npy

Writes fp32 [TOKENS, vocabulary]: of one example, the tokens `ids(vocabulary)`.
"""

import sys
from pathlib import Path

import numpy as np

from parallel.runtime import launch, prepare_environment, requested_world_size
from tools import cli

TOKENS = 96


def ids(vocab_size: int) -> np.ndarray:
    """int64 [1, TOKENS]: random tokens, always the same."""
    return np.random.default_rng(0).integers(3, vocab_size, (1, TOKENS))


def main(kind: str, path: str, file: str) -> int:
    """The program; returns its exit status."""
    found = []
    try:
        world_size = requested_world_size(None)
        prepare_environment(world_size)
        import torch

        from parallel.mesh import Mesh
        from tools.model_source import ModelSource

        source = ModelSource.of_model(path) if kind == "--model" else ModelSource.of_checkpoint(Path(path))
    except (ValueError, OSError) as error:
        return cli.fail(error)

    def program(runtime):
        mesh = Mesh.create(runtime.rank, runtime.world_size, 1)
        model = source.build(mesh.tp, runtime.device, torch.float32)
        positions = torch.arange(TOKENS)[None]
        inputs = (torch.from_numpy(ids(source.config.vocab_size)), positions, torch.ones_like(positions))
        inputs = [runtime.upload(each) for each in inputs]
        runtime.mark_step()
        with torch.no_grad():
            logits = model(*inputs)
        runtime.mark_step()
        found.append(logits.cpu()[0].numpy())

    launch(program, world_size)
    np.save(file, found[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
