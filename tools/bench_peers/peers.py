"""The peers of tools/bench_peers/__main__.py, each in a process of its own: a plain loop on torch_xla, and
trl's SFTTrainer with peft.

    python -m tools.bench_peers.peers plain|trl|trl_padded DIRECTORY

DIRECTORY is what tools.bench_peers.make left: config.json, a tokenizer, data.jsonl, settings.json. The tokens
are markstep's own, made by data.tokens. Prints one line of JSON: the seconds of each step after the warmup,
and of a step, on the average of the data set, tokens that are no padding, those of them that train, and
positions, padding included.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from data.tokens import IGNORED, Tokens, cache_directory, tokenize

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FILES = {"data": "data.jsonl", "settings": "settings.json", "tokens": "tokens"}


def read(directory: Path) -> tuple[Tokens, dict]:
    """(the tokens of the data, the settings: row_length, rows of a step, steps, warmup)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = tokenize(
        str(directory / FILES["data"]), tokenizer, cache=cache_directory(str(directory / FILES["tokens"]))
    )
    return tokens, json.loads((directory / FILES["settings"]).read_text(encoding="utf-8"))


def full_rows(tokens: Tokens, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels), int64 [rows, length]: all examples one behind the other, cut where a row ends."""
    count = len(tokens.input_ids) // length
    ids = np.asarray(tokens.input_ids[: count * length], np.int64)
    labels = np.where(tokens.trained[: count * length], ids, IGNORED)
    return ids.reshape(count, length), labels.reshape(count, length)


def adapted(directory: Path):
    """(the transformers model with random weights, fp32; the LoRA that all sides train)."""
    import torch
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(directory, attn_implementation="sdpa"))
    return model, LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM"
    )


def plain(directory: Path) -> dict:
    """A transformers model with peft's LoRA in a loop on torch_xla: full rows without masks, so that examples
    see each other.

    As markstep, it reads the loss of a step when the next one has been started, so that tracing hides behind
    the device."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch
    import torch_xla
    from peft import get_peft_model
    from torch_xla.debug.metrics import metric_data

    tokens, settings = read(directory)
    ids, labels = full_rows(tokens, settings["row_length"])
    rows, device = settings["rows"], torch_xla.device()
    model = get_peft_model(*adapted(directory)).train().to(device)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-4)
    ended, started = [], None
    for step in range(settings["warmup"] + settings["steps"]):
        chosen = np.arange(step * rows, (step + 1) * rows) % len(ids)
        inputs, targets = (torch.from_numpy(each[chosen]).to(device) for each in (ids, labels))
        loss = model(input_ids=inputs, labels=targets, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:  # the first has the moments' zeros in it
            instructions = pending_instructions()
        torch_xla.sync()
        if started is not None:
            started.item()
        started = loss.detach()
        ended.append(time.perf_counter())
        if step == settings["warmup"] - 1:
            compiled = metric_data("CompileTime")[0]
    return figures(ended[settings["warmup"] - 1 :], rows, ids, labels) | {
        "instructions": instructions,
        "loss": started.item(),
        "recompilations": metric_data("CompileTime")[0] - compiled,
    }


def pending_instructions() -> int:
    """HLO instructions of what has been recorded since the last sync."""
    from parallel.graph import backend
    from parallel.graph.hlo import Graph
    from parallel.graph.live import live_tensors

    [tensors] = live_tensors(1)
    return len(Graph(backend.hlo_text(backend.pending_tensors(tensors))).instructions)


def trl(directory: Path, padded: bool) -> dict:
    """trl's SFTTrainer and peft on the CPU: packed by `bfd`, a row a micro-batch; or an example a row, all
    padded.

    trl packs without contamination by position ids alone, which transformers makes a mask of where a batch is
    one row: the micro-batches are flattened into one row, and attention costs least where they have one. A
    step is enough for warming up."""
    os.environ.update(
        USE_TORCH_XLA="0", HF_DATASETS_DISABLE_PROGRESS_BARS="1"
    )  # else accelerate takes the XLA device
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokens, settings = read(directory)
    pieces = list(zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True))
    labels = np.where(tokens.trained, tokens.input_ids, IGNORED)
    dataset = datasets.Dataset.from_dict(
        {
            "input_ids": [tokens.input_ids[begin:end].tolist() for begin, end in pieces],
            "labels": [labels[begin:end].tolist() for begin, end in pieces],
        }
    )
    rows, length, ended = settings["rows"], settings["row_length"], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ended.append(time.perf_counter())

    layout = (
        {"per_device_train_batch_size": rows, "pad_to_multiple_of": length}
        if padded
        else {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": rows,
            "packing": True,
            "packing_strategy": "bfd",
        }
    )
    model, lora = adapted(directory)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(directory / "trl"),
            max_length=length,
            max_steps=1 + settings["steps"],
            learning_rate=2e-4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=1000,
            report_to=[],
            disable_tqdm=True,
            **layout,
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=lora,
        callbacks=[Clock()],
    )
    several = [] if padded else [row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1]
    isolated = is_isolated(trainer.model, trainer.data_collator(several[:1])) if several else None
    trainer.train()
    packed = trainer.train_dataset
    return figures(ended, rows, packed["input_ids"], packed["labels"], rows * length if padded else None) | {
        "isolated": isolated
    }


def is_isolated(model, batch: dict) -> bool:
    """Whether the last example of a packed row stays as it is when the tokens before it change.

    As trl calls the model, without a cache: with one, transformers makes no mask of the position ids."""
    import torch

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
    """ended: the moments at which the last step of the warmup and those behind it ended. ids and labels: of
    all rows of the data set; a step has `rows` of them. Without `positions`, they have no padding."""
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
