"""Merge a sharded checkpoint into a Hugging Face model, or into a peft adapter.

Tensors are read, merged in fp32 and written in bands of rows, so memory does not grow with the model. The
output directory gets its name when it is complete.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from model.config import ModelConfig
from model.weights.hub import in_one_line, resolve
from model.weights.shapes import trained_shapes
from tools.merge_checkpoint.card import ADAPTER, BASE, MODEL, Base, model_card
from tools.merge_checkpoint.model_files import write_adapter, write_model
from tools.merge_checkpoint.nxd import NxdCheckpoint
from tools.merge_checkpoint.sources import AdaptedWeights, TrainedWeights
from trainer.checkpoint.model_files import check_listed
from trainer.checkpoint.names import INCOMPLETE, not_written
from trainer.checkpoint.reader import Checkpoint
from trainer.prompts import PromptFormat, generation_config
from trainer.tokenizer import load_tokenizer

CARD = "README.md"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge(
    checkpoint_path: Path,
    output: Path,
    adapter_only: bool = False,
    base_only: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    device: str = "cpu",
    verify: bool = False,
    model_id: str | None = None,
    hub_id: str | None = None,
) -> None:
    """Write the merged model (or the adapter, or the base) to the new directory `output`, with a model card.

    `dtype`: of all weights; default: the base model's under LoRA, else that of the model's config.json.
    `hub_id`: where it will be uploaded, for the card.
    Raises ValueError and leaves nothing behind.
    """
    path, output, max_bytes = Path(checkpoint_path), Path(output), parse_size(max_shard_size)
    check_output(output, device)
    if NxdCheckpoint.is_one(path):
        if adapter_only or base_only or not model_id:
            raise ValueError(
                f"{path} is a checkpoint of neuronx-distributed: pass --model_id, a Hugging Face directory "
                "with its config and tokenizer, and neither --adapter_only nor --base_only"
            )
        directory = resolve(model_id)
        config = ModelConfig.from_pretrained(directory)
        source, listed, checkpoint = NxdCheckpoint(path, config), None, None
    else:
        checkpoint, directory = open_checkpoint(path, needs_adapter=adapter_only or base_only), path
        listed = checkpoint.manifest["files"]
        check_listed(directory, listed)
        config = ModelConfig.from_pretrained(directory)
        checkpoint.check_tensors(trained_shapes(config, checkpoint.lora), kinds=("parameter",))
        if checkpoint.lora is None:
            source = TrainedWeights(checkpoint, config)
        elif not adapter_only:
            source = AdaptedWeights(checkpoint, config, model_id, base_only, device)
    tokenizer = load_tokenizer(directory)
    generation = generation_config(directory, tokenizer, config.vocab_size)
    kind = ADAPTER if adapter_only else BASE if base_only else MODEL
    prompts = PromptFormat.read(directory, tokenizer)
    card = model_card(kind, hub_id or output.resolve().name, checkpoint, prompts, model_id)
    with new_directory(output) as partial:
        if adapter_only:
            base = Base.of(checkpoint, model_id)
            write_adapter(checkpoint, base.hub_id or base.reference, partial, dtype)
        else:
            write_model(source, directory, generation, partial, dtype, max_bytes, verify, listed)
        (partial / CARD).write_text(card, encoding="utf-8")


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "2GiB"; raises ValueError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if not match or match[2] not in UNITS or float(match[1]) <= 0:
        raise ValueError(f"--max_shard_size {text}: a size such as 5GB or 500MB was expected")
    return int(float(match[1]) * UNITS[match[2]])


def check_output(output: Path, device: str) -> None:
    """Raise ValueError unless `output` can be written and `device` can compute."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already: choose another output directory, or move it away")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {in_one_line(error)}") from None


def open_checkpoint(path: Path, needs_adapter: bool) -> Checkpoint:
    """The checkpoint at `path`; raises ValueError where it is none, or lacks the adapter that it needs."""
    checkpoint = Checkpoint(path)
    if checkpoint.lora is None and needs_adapter:
        raise ValueError(
            f"{checkpoint.path} was trained without LoRA: there is no adapter; leave --adapter_only and "
            "--base_only out"
        )
    return checkpoint


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """An empty directory to write into, which is renamed to `output` at the end, or removed after an error.

    Raises ValueError where another process is writing the same output, and where the user's own files have
    the name of the directory.
    """
    partial = output.with_name(output.name + INCOMPLETE)
    if os.path.lexists(partial) and (what := not_written(partial)):
        raise ValueError(f"{partial} is {what}, which no merge has made: move it away")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)  # a merge that was killed leaves its directory, but no lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{output} is being written by another merge") from None
    try:
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
