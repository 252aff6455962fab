"""Write the directory of a Hugging Face model, or of a peft adapter, with memory for a few bands of rows."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from model.config import ARCHITECTURES
from model.weights.hub import naming, read_json
from model.weights.peft import adapter_config, peft_name
from model.weights.safetensors_file import TensorWriter
from model.weights.sources import SafetensorsFiles
from tools.merge_checkpoint.sources import CONFIG, WeightSource
from trainer.checkpoint.model_files import copy_known_files
from trainer.checkpoint.reader import Checkpoint
from trainer.prompts import GENERATION

INDEX = "model.safetensors.index.json"
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of a file: name -> (dtype, shape)


def write_model(
    source: WeightSource,
    directory: Path,
    generation: dict,
    output: Path,
    dtype: torch.dtype | None,
    max_bytes: int,
    verify: bool,
    listed: dict[str, dict] | None,
) -> None:
    """Write the model to the empty directory `output`: weights, generation config, and from `directory` the
    config and the tokenizer, which for a checkpoint are `listed` in its manifest.

    `dtype`: of all weights; None keeps each weight's own. `max_bytes`: of one file. Raises ValueError where
    the weights that were written are not the source's; with `verify`, they are compared bit by bit.
    """
    files = plan_files(source, dtype, max_bytes)
    write_weights(source, files, output)
    copy_known_files(directory, output, listed)
    _write_settings(output / GENERATION, generation)
    write_config(files, output)
    SafetensorsFiles(output).check(source.shapes)
    if verify:
        verify_weights(source, files, output)


def plan_files(source: WeightSource, dtype: torch.dtype | None, max_bytes: int) -> dict[str, Tensors]:
    """File name -> its tensors, in the model's order. A file that would exceed `max_bytes` is split."""
    groups, size = [{}], 0
    for name, shape in source.shapes.items():
        tensor_dtype = dtype or source.dtype(name)
        tensor_bytes = _bytes(tensor_dtype, shape)
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


def write_weights(source: WeightSource, files: dict[str, Tensors], output: Path) -> None:
    """Write the safetensors files, and the index where there are several."""
    writers = {
        file: TensorWriter(output / file, tensors, {"format": "pt"}) for file, tensors in files.items()
    }

    def write(file, name, dtype, progress):
        first = 0
        for band in source.stream(name):
            band = band.to(dtype)
            writers[file].write(name, band, first)
            first += band.numel()
            progress.update(band.nbytes)

    _for_each_tensor(write, files, "merge")
    for writer in writers.values():
        writer.close()
    if len(files) > 1:
        total = sum(_bytes(*each) for tensors in files.values() for each in tensors.values())
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        _write_settings(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_config(files: dict[str, Tensors], output: Path) -> None:
    """Say in the config.json of `output` of which class and dtype the written model is."""
    dtypes = {dtype for tensors in files.values() for dtype, _ in tensors.values()}
    name = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"
    settings = read_json(output / CONFIG)
    class_name = ARCHITECTURES[settings["model_type"]].class_name
    settings |= {"architectures": [class_name], "torch_dtype": name}
    if "dtype" in settings:  # the newer name, which transformers prefers
        settings["dtype"] = name
    _write_settings(output / CONFIG, settings)


def verify_weights(source: WeightSource, files: dict[str, Tensors], output: Path) -> None:
    """Stream all weights again; raises ValueError where a file of `output` has other bits."""
    written = SafetensorsFiles(output)

    def compare(file, name, dtype, progress):
        first, all_columns = 0, tuple(slice(0, size) for size in source.shapes[name][1:])
        for band in source.stream(name):
            stored = written.read(name, (slice(first, first + len(band)), *all_columns))
            if not torch.equal(stored.view(torch.uint8), band.to(dtype).view(torch.uint8)):
                raise ValueError(
                    f"{output / file}: {name} is not what was written: the disk or the memory is at fault"
                )
            first += len(band)
            progress.update(stored.nbytes)

    _for_each_tensor(compare, files, "verify")


def write_adapter(checkpoint: Checkpoint, base: str, output: Path, dtype: torch.dtype | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, LoRA's factors in fp32 or `dtype`.

    base: the hub id or the path of the base model, for peft.
    """
    tensors = {
        peft_name(name): torch.cat(list(checkpoint.stream(name))).to(dtype or torch.float32)
        for name in checkpoint.shapes
    }
    try:
        save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{output / 'adapter_model.safetensors'} cannot be written: {error}") from None
    settings = adapter_config(checkpoint.lora, base)
    _write_settings(output / "adapter_config.json", settings)


def _for_each_tensor(work: Callable, files: dict[str, Tensors], label: str) -> None:
    """Call work(file, name, dtype, progress) for every tensor, several at once; the first error ends all."""
    tasks = [
        (file, name, dtype, _bytes(dtype, shape))
        for file, tensors in files.items()
        for name, (dtype, shape) in tensors.items()
    ]
    total = sum(size for *_, size in tasks)
    with (
        tqdm(total=total, desc=label, unit="B", unit_scale=True) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        # The largest first, so that none of them is left for the end.
        tasks.sort(key=lambda task: -task[3])
        futures = [pool.submit(work, file, name, dtype, progress) for file, name, dtype, _ in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _write_settings(path: Path, settings: dict) -> None:
    with naming(path):
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
