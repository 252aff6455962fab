"""A sharded checkpoint -> a Hugging Face model, or the LoRA adapter alone in peft's format.

    python -m tools.merge_checkpoint output/checkpoint-10 merged [--adapter_only | --base_only] [--dtype
    bfloat16] [--verify]

Also of neuronx-distributed's own checkpoints, with --model_id for config and tokenizer. Tensors are read,
merged in fp32 and written in bands of rows, so memory does not grow with the model. The output directory
appears under its name when it is complete.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from model.config import ModelConfig
from model.lora import lora_delta
from model.weights.hub import read_json, resolve
from model.weights.peft import adapter_config, peft_name
from model.weights.safetensors_file import TensorWriter, bands
from model.weights.shapes import base_shapes, trained_shapes
from model.weights.sources import SafetensorsFiles
from tools.merge_checkpoint.nxd import NxdCheckpoint
from tools.model_source import open_base
from trainer.checkpoint.names import INCOMPLETE
from trainer.checkpoint.reader import BAND_BYTES, Checkpoint
from trainer.job import load_tokenizer
from trainer.prompts import GENERATION, generation_config

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
COPIED = (
    "config.json",
    "token",
    "special_tokens",
    "vocab",
    "merges",
    "chat_template",
    "added_tokens",
    "additional_chat_templates",
    "prompt_format.json",
)


class Trained:
    """What a full training left: the parameters themselves."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig):
        self.shapes, self._checkpoint = base_shapes(config), checkpoint
        settings = read_json(checkpoint.path / CONFIG)
        self._dtype = DTYPES.get(settings.get("dtype") or settings.get("torch_dtype"), torch.float32)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        return self._checkpoint.stream(name)


class Adapted:
    """The base model, with the checkpoint's LoRA update added in fp32 unless `base_only`."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, model_id: str | None, base_only: bool, device: str
    ):
        self.shapes, self._checkpoint, self._base_only, self._device = (
            base_shapes(config),
            checkpoint,
            base_only,
            device,
        )
        self._base = open_base(checkpoint, config, model_id)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        module, shape = name.removesuffix(".weight"), self.shapes[name]
        factors = None
        if f"{module}.lora_A.weight" in self._checkpoint.shapes and not self._base_only:
            names = [f"{module}.lora_{letter}.weight" for letter in "AB"]
            factors = [torch.cat(list(self._checkpoint.stream(each))).to(self._device) for each in names]
        rest = tuple(slice(0, size) for size in shape[1:])
        for first, last in bands(shape, 4, BAND_BYTES):
            band = self._base.read(name, (slice(first, last), *rest))
            if factors:
                delta = lora_delta(factors[0], factors[1][first:last], self._checkpoint.lora)
                band = (band.to(self._device).float() + delta).cpu()
            yield band


def plan_files(
    source, dtype: torch.dtype | None, max_bytes: int
) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """File name -> {tensor: (dtype, shape)}: in the model's order, a new file where the last one would exceed
    `max_bytes`."""
    groups, size = [{}], 0
    for name, shape in source.shapes.items():
        tensor_dtype = dtype or source.dtype(name)
        tensor_bytes = torch.Size(shape).numel() * tensor_dtype.itemsize
        if groups[-1] and size + tensor_bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = (tensor_dtype, shape)
        size += tensor_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def for_each_tensor(work, files: dict[str, dict], what: str) -> None:
    """Call work(file, name, dtype, progress) for every tensor, several at once; the first error ends all."""
    tasks = [
        (file, name, dtype, shape)
        for file, tensors in files.items()
        for name, (dtype, shape) in tensors.items()
    ]
    total = sum(torch.Size(shape).numel() * dtype.itemsize for _, _, dtype, shape in tasks)
    with (
        tqdm(total=total, desc=what, unit="B", unit_scale=True) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        # The largest first, so that none of them is left for the end.
        tasks.sort(key=lambda task: -torch.Size(task[3]).numel())
        futures = [pool.submit(work, file, name, dtype, progress) for file, name, dtype, _ in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_model(
    source,
    directory: Path,
    generation: dict,
    output: Path,
    dtype: torch.dtype | None,
    max_bytes: int,
    verify: bool,
) -> None:
    """Write weights (one file, or several with an index), the generation config, and from `directory` config
    and tokenizer."""
    files = plan_files(source, dtype, max_bytes)
    writers = {
        file: TensorWriter(output / file, tensors, {"format": "pt"}) for file, tensors in files.items()
    }

    def write(file, name, tensor_dtype, progress):
        first = 0
        for band in source.stream(name):
            band = band.to(tensor_dtype)
            writers[file].write(name, band, first)
            first += band.numel()
            progress.update(band.nbytes)

    for_each_tensor(write, files, "merge")
    for writer in writers.values():
        writer.close()
    if len(files) > 1:
        total = sum(
            torch.Size(shape).numel() * each.itemsize
            for tensors in files.values()
            for each, shape in tensors.values()
        )
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, tensors in files.items() for name in tensors},
        }
        (output / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for path in directory.iterdir():
        if path.name.startswith(COPIED):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, output / path.name)
    (output / GENERATION).write_text(json.dumps(generation, indent=2), encoding="utf-8")
    settings, dtypes = (
        read_json(output / CONFIG),
        {each for tensors in files.values() for each, _ in tensors.values()},
    )
    name = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"
    settings |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": name}
    if "dtype" in settings:  # the newer name, which transformers prefers
        settings["dtype"] = name
    (output / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    written = SafetensorsFiles(output)
    written.check(source.shapes)

    def compare(file, name, tensor_dtype, progress):
        first, rest = 0, tuple(slice(0, size) for size in source.shapes[name][1:])
        for band in source.stream(name):
            there = written.read(name, (slice(first, first + len(band)), *rest))
            if not torch.equal(there.view(torch.uint8), band.to(tensor_dtype).view(torch.uint8)):
                raise ValueError(
                    f"{output / file}: {name} is not what was written: the disk or the memory is at fault"
                )
            first += len(band)
            progress.update(there.nbytes)

    if verify:
        for_each_tensor(compare, files, "verify")


def write_adapter(checkpoint: Checkpoint, output: Path, dtype: torch.dtype | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, the factors in fp32 or `dtype`."""
    tensors = {
        peft_name(name): torch.cat(list(checkpoint.stream(name))).to(dtype or torch.float32)
        for name in checkpoint.shapes
    }
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = adapter_config(checkpoint.lora, checkpoint.manifest["model"])
    (output / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


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
) -> None:
    """Write the merged model (or the adapter, or the base) to the new directory `output`.

    `dtype`: of all weights; default: the base model's under LoRA, else that of the model's config.json.
    Raises ValueError and leaves nothing behind.
    """
    output, max_bytes = Path(output), parse_size(max_shard_size)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already: choose another output directory, or move it away")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {' '.join(str(error).split())[:200]}") from None
    if NxdCheckpoint.is_one(Path(checkpoint_path)):
        if adapter_only or base_only or not model_id:
            raise ValueError(
                f"{checkpoint_path} is a checkpoint of neuronx-distributed: pass --model_id, a Hugging Face "
                "directory with its config and tokenizer, and neither --adapter_only nor --base_only"
            )
        checkpoint, directory = None, resolve(model_id)
        config = ModelConfig.from_pretrained(directory)
        source = NxdCheckpoint(Path(checkpoint_path), config)
    else:
        checkpoint, directory = Checkpoint(checkpoint_path), Path(checkpoint_path)
        if checkpoint.lora is None and (adapter_only or base_only):
            raise ValueError(
                f"{checkpoint.path} was trained without LoRA: there is no adapter; leave --adapter_only and "
                "--base_only out"
            )
        config = ModelConfig.from_pretrained(directory)
        checkpoint.check_tensors(trained_shapes(config, checkpoint.lora), kinds=("parameter",))
        if not adapter_only:
            source = (
                Adapted(checkpoint, config, model_id, base_only, device)
                if checkpoint.lora
                else Trained(checkpoint, config)
            )
    generation = generation_config(directory, load_tokenizer(directory), config.vocab_size)
    partial = output.with_name(output.name + INCOMPLETE)
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
        if adapter_only:
            write_adapter(checkpoint, partial, dtype)
        else:
            write_model(source, directory, generation, partial, dtype, max_bytes, verify)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "2GiB"; raises ValueError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if not match or match[2] not in UNITS or float(match[1]) <= 0:
        raise ValueError(f"--max_shard_size {text}: a size such as 5GB or 500MB was expected")
    return int(float(match[1]) * UNITS[match[2]])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge_checkpoint", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a directory checkpoint-<step>, or one that neuronx-distributed wrote"
    )
    parser.add_argument("output", type=Path, help="the directory to write; it must not exist, or be empty")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--adapter_only", action="store_true", help="write the LoRA adapter alone, in peft's format"
    )
    only.add_argument(
        "--base_only", action="store_true", help="write the base model, without the LoRA update"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights that are written; default: that of the model"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="the largest file (default: 5GB)")
    parser.add_argument("--device", default="cpu", help="where the LoRA products are computed (default: cpu)")
    parser.add_argument(
        "--verify", action="store_true", help="compute everything again and compare it with what was written"
    )
    parser.add_argument("--model_id", help="the base model, where it is no longer where training read it")
    arguments = vars(parser.parse_args())
    arguments["dtype"] = DTYPES.get(arguments["dtype"])
    checkpoint, output = arguments.pop("checkpoint"), arguments.pop("output")
    try:
        merge(checkpoint, output, **arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
