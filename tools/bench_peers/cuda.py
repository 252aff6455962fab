"""A peer of bench_peers on a GPU: a plain loop on torch's own CUDA, transformers' model with peft's LoRA.

    python -m tools.bench_peers.cuda DIRECTORY

DIRECTORY has what tools.bench_peers.inputs made. Needs torch, transformers, peft and numpy alone, so that
another Python than markstep's can run it. Prints one line of JSON: see tools/bench_peers/peers.py; besides,
the seconds from the program's start to the end of the first step, and the most bytes of the GPU's memory in
use.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

BEGUN = time.perf_counter()  # before the slow imports

from tools.bench_peers.inputs import FILES, LORA  # noqa: E402


def random_model(directory: Path, device: str, dtype):
    """A transformers model with random weights, drawn on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory, attn_implementation="sdpa")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # has a buffer
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, config.initializer_range)
            else:
                parameter.fill_(1.0)
    return model


def plain(directory: Path) -> dict:
    """Train in a loop on the rows that markstep packs; returns the figures.

    There are no masks, so examples of a row see each other. Adapters have the model's dtype. As in markstep,
    the loss of a step is read when the next one has started.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    settings = json.loads((directory / FILES["settings"]).read_text(encoding="utf-8"))
    found, device, rows = np.load(directory / FILES["rows"]), settings["device"], settings["rows"]
    model = random_model(directory, device, torch.bfloat16 if settings["bf16"] else torch.float32)
    if settings["gradient_checkpointing"] != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(**LORA), autocast_adapter_dtype=False).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=device == "cuda")
    ended, started = [], None
    for step in range(settings["warmup"] + settings["steps"] + 1):
        micro_batches = micro_batches_of(step, settings, len(found["input_ids"]))
        loss = 0.0
        for micro_batch in micro_batches:
            inputs, targets = (
                torch.from_numpy(found[name][micro_batch]).to(device) for name in ("input_ids", "labels")
            )
            mean = model(input_ids=inputs, labels=targets, use_cache=False).loss / len(micro_batches)
            mean.backward()
            loss = loss + mean.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if started is not None:
            started.item()
            ended.append(time.perf_counter())
        started = loss
    # What is read in a step is the loss of the one before: `ended` are the ends of all but the last.
    return {
        **row_figures(ended[settings["warmup"] - 1 :], rows, found),
        "loss": started.item(),
        "first_step_seconds": ended[0] - BEGUN,
        "memory_bytes": memory_bytes(device),
    }


def micro_batches_of(step: int, settings: dict, count: int) -> list[np.ndarray]:
    """The numbers of the rows of each micro-batch of a step, among `count` rows that are taken in turn."""
    rows = settings["rows"]
    chosen = np.arange(step * rows, (step + 1) * rows) % count
    return np.split(chosen, rows // settings["micro_batch"])


def row_figures(ended: list[float], rows: int, found) -> dict:
    """As peers.figures, of the arrays that inputs.save_rows wrote."""
    targets = (found["labels"] >= 0).sum(1).mean()
    return {
        "seconds": np.diff(ended).tolist(),
        "tokens": rows * float(found["lengths"].mean()),
        "target_tokens": rows * float(targets),
        "positions": rows * found["input_ids"].shape[1],
    }


def memory_bytes(device: str) -> int:
    """The most bytes of the GPU's memory that torch's tensors have had; on a CPU, those of the process."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    print(json.dumps(plain(Path(sys.argv[1]))))
