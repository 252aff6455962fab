"""The peers of bench_peers: a plain loop on torch_xla, and trl's SFTTrainer with peft.

    python -m tools.bench_peers.peers plain|trl|trl_padded DIRECTORY

DIRECTORY has what tools.bench_peers.inputs.make wrote. The tokens are those that markstep trains on, made by
data.tokens. Prints one line of JSON: the seconds of each step after the warmup, and averages of a step over
the data set: tokens without padding, those of them that are trained on, and positions, padding included.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

BEGUN = time.perf_counter()  # before the slow imports

from data.tokens import IGNORED, Tokens  # noqa: E402
from tools.bench_peers.cuda import memory_bytes, micro_batches_of, random_model  # noqa: E402
from tools.bench_peers.inputs import LORA, read  # noqa: E402


def full_rows(tokens: Tokens, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels), int64 [rows, length]: all examples one after the other, cut where a row ends."""
    count = len(tokens.input_ids) // length
    ids = np.asarray(tokens.input_ids[: count * length], np.int64)
    labels = np.where(tokens.trained[: count * length], ids, IGNORED)
    return ids.reshape(count, length), labels.reshape(count, length)


def adapted(directory: Path, settings: dict):
    """(a transformers model with random weights, the LoRA that all sides train)."""
    import torch
    from peft import LoraConfig

    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    return random_model(directory, settings["device"], dtype), LoraConfig(**LORA)


def plain(directory: Path) -> dict:
    """Train a transformers model with peft's LoRA in a loop on torch_xla; returns the figures.

    Rows are full and have no masks, so that examples see each other. As in markstep, each micro-batch is a
    graph, and the loss of a step is read when the next one has started, so that the host traces while the
    device works.
    """
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch
    import torch_xla
    from peft import get_peft_model
    from torch_xla.debug.metrics import metric_data

    tokens, settings = read(directory)
    ids, labels = full_rows(tokens, settings["row_length"])
    rows, device = settings["rows"], torch_xla.device()
    model = get_peft_model(*adapted(directory, settings)).train().to(device)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-4)
    ended, started, instructions = [], None, 0

    def sync(step):
        nonlocal instructions
        if step == 1:  # the first step also creates AdamW's moments
            instructions += pending_instructions()
        torch_xla.sync()

    for step in range(settings["warmup"] + settings["steps"]):
        micro_batches = micro_batches_of(step, settings, len(ids))
        loss = 0.0
        for number, micro_batch in enumerate(micro_batches):
            if number:
                sync(step)
            inputs, targets = (torch.from_numpy(each[micro_batch]).to(device) for each in (ids, labels))
            mean = model(input_ids=inputs, labels=targets, use_cache=False).loss / len(micro_batches)
            mean.backward()
            loss = loss + mean.detach()
        optimizer.step()
        optimizer.zero_grad()
        sync(step)
        if started is not None:
            started.item()
        started = loss
        ended.append(time.perf_counter())
        if step == settings["warmup"] - 1:
            compiled = metric_data("CompileTime")[0]
    return figures(ended[settings["warmup"] - 1 :], rows, ids, labels) | {
        "instructions": instructions,
        "loss": started.item(),
        "recompilations": metric_data("CompileTime")[0] - compiled,
        "memory_bytes": memory_bytes(device.type),
    }


def pending_instructions() -> int:
    """The number of HLO instructions that have been recorded since the last sync."""
    from parallel.graph import backend
    from parallel.graph.hlo import Graph
    from parallel.graph.live import live_tensors

    [tensors] = live_tensors(1)
    return len(Graph(backend.hlo_text(backend.pending_tensors(tensors))).instructions)


def trl(directory: Path, padded: bool) -> dict:
    """Train with trl's SFTTrainer and peft on the CPU or GPU; returns the figures.

    Without `padded`, rows are packed by trl's strategy `bfd`. trl separates the examples of a packed row by
    position ids alone, and transformers makes a mask of these only where a batch is one row. So trl flattens
    a micro-batch into one row, and attention costs least where the micro-batch has one row: it has one here,
    and the others are accumulated. With `padded`, each row is one example. One step is enough as warmup.
    Under bf16 it trains as trl does by default: a bf16 model, adapters in fp32, autocast.
    """
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    tokens, settings = read(directory)
    rows, length, ended = settings["rows"], settings["row_length"], []
    trainer = _sft_trainer(directory, tokens, settings, padded, ended)
    several = [] if padded else [row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1]
    before = time.perf_counter()
    isolated = is_isolated(trainer.model, trainer.data_collator(several[:1])) if several else None
    checking = time.perf_counter() - before
    trainer.train()
    packed = trainer.train_dataset
    found = figures(ended, rows, packed["input_ids"], packed["labels"], rows * length if padded else None)
    return found | {
        "isolated": isolated,
        "first_step_seconds": ended[0] - BEGUN - checking,
        "memory_bytes": memory_bytes(settings["device"]),
    }


def _sft_trainer(directory: Path, tokens: Tokens, settings: dict, padded: bool, ended: list[float]):
    """trl's trainer, which appends the moment of each step's end to `ended`."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if settings["device"] == "cuda":
                torch.cuda.synchronize()
            ended.append(time.perf_counter())

    rows, length = settings["rows"], settings["row_length"]
    if padded:
        layout = {"per_device_train_batch_size": rows, "pad_to_multiple_of": length}
    else:
        layout = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": rows,
            "packing": True,
            "packing_strategy": "bfd",
        }
    model, lora = adapted(directory, settings)
    arguments = SFTConfig(
        str(directory / "trl"),
        max_length=length,
        max_steps=1 + settings["steps"],
        learning_rate=2e-4,
        use_cpu=settings["device"] != "cuda",
        bf16=settings["bf16"],
        gradient_checkpointing=settings["gradient_checkpointing"] != "none",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        **layout,
    )
    return SFTTrainer(
        model,
        arguments,
        train_dataset=_dataset(tokens),
        processing_class=AutoTokenizer.from_pretrained(directory, trust_remote_code=False),
        peft_config=lora,
        callbacks=[Clock()],
    )


def _dataset(tokens: Tokens):
    """The examples as a datasets.Dataset with the columns input_ids and labels."""
    import datasets

    pieces = list(zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True))
    labels = np.where(tokens.trained, tokens.input_ids, IGNORED)
    return datasets.Dataset.from_dict(
        {
            "input_ids": [tokens.input_ids[begin:end].tolist() for begin, end in pieces],
            "labels": [labels[begin:end].tolist() for begin, end in pieces],
        }
    )


def is_isolated(model, batch: dict) -> bool:
    """Whether the last example of a packed row stays as it is when the tokens before it change.

    The model is called without a cache, as trl does: with one, transformers makes no mask of position ids.
    """
    import torch

    # Newer collators add plain numbers, the longest example's length among them.
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    batch |= {name: value.to(model.device) for name, value in tensors.items()}
    begin = int((batch["position_ids"][0] == 0).nonzero()[-1])
    changed = batch["input_ids"].clone()
    changed[:, :begin] = changed[:, :begin].roll(1, 1)
    with torch.no_grad():
        before, after = (
            model(**batch | {"input_ids": ids, "use_cache": False}).logits[:, begin:]
            for ids in (batch["input_ids"], changed)
        )
    return bool(torch.equal(before, after))


def figures(ended: list[float], rows: int, ids, labels, positions: int | None = None) -> dict:
    """What a side reports (see the top of this file).

    `ended`: the moments at which the last step of the warmup and all steps after it ended. `ids`, `labels`:
    of all rows of the data set, of which a step has `rows`. `positions`: of a step; None: its tokens, without
    padding.
    """
    tokens = rows * float(np.mean([len(row) for row in ids]))
    targets = rows * float(np.mean([np.count_nonzero(np.asarray(row) != IGNORED) for row in labels]))
    return {
        "seconds": np.diff(ended).tolist(),
        "tokens": tokens,
        "target_tokens": targets,
        "positions": positions or tokens,
    }


SIDES = {
    "plain": plain,
    "trl": lambda directory: trl(directory, False),
    "trl_padded": lambda directory: trl(directory, True),
}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](Path(sys.argv[2]))))
