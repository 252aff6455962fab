"""A sharded checkpoint -> a Hugging Face model, or the LoRA adapter alone in peft's format.

    python -m tools.merge_checkpoint output/checkpoint-10 merged [--adapter_only] [--model_id BASE]

Tensors are read, merged in fp32 and written file by file; the output directory appears under its name when it is complete.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from model.adapters import adapter_config, peft_name
from model.files import read_json, resolve
from model.llama import LlamaConfig
from model.lora import lora_delta
from model.weights import base_shapes, check_weights, open_weights, trained_shapes
from parallel.layers import Shard
from trainer.checkpoint import MODEL_FILES, Checkpoint

MAX_SHARD_BYTES = 5 * 10**9     # Hugging Face's default: "5GB"


def merged_tensor(checkpoint: Checkpoint, base, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The whole weight of that Hugging Face name: as trained, or the base's (in its dtype) with the LoRA update added in fp32."""
    if checkpoint.lora is None:
        return checkpoint.read("parameter", name)
    weight = base.read(name, Shard(shape))
    module = name.removesuffix(".weight")
    if f"{module}.lora_A.weight" not in checkpoint.shapes:
        return weight
    factors = (checkpoint.read("parameter", f"{module}.lora_{letter}.weight") for letter in "AB")
    return (weight.float() + lora_delta(*factors, checkpoint.lora)).to(weight.dtype)


def write_model(checkpoint: Checkpoint, output: Path, model_id: str | None) -> None:
    """Write weights (one file, or several with an index), config, generation config and tokenizer to `output`."""
    config = LlamaConfig.from_pretrained(checkpoint.path)
    checkpoint.check_tensors(trained_shapes(config, checkpoint.lora))
    shapes, base = base_shapes(config), None
    if checkpoint.lora:
        random_seed = None if model_id else checkpoint.manifest["random_seed"]
        directory = Path() if random_seed is not None else resolve(model_id or checkpoint.manifest["model"])
        base = open_weights(directory, config, random_seed)
        check_weights(config, base)
        if base.fingerprint(shapes) != checkpoint.manifest["identity"]["base"]:
            raise ValueError(f"{directory} is not the model that {checkpoint.path} was trained on: its weights are others")
    files, size = [[]], 0
    for name, shape in shapes.items():
        # Bytes as fp32: an upper bound that needs no tensor to be read.
        tensor_bytes = 4 * torch.Size(shape).numel()
        if size and size + tensor_bytes > MAX_SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor_bytes
    weight_map, total, dtypes = {}, 0, set()
    with tqdm(total=len(shapes), desc="merge", unit="tensor") as progress:
        for number, names in enumerate(files, 1):
            file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = merged_tensor(checkpoint, base, name, shapes[name]).contiguous()
                weight_map[name] = file
                total += tensors[name].nbytes
                dtypes.add(str(tensors[name].dtype).removeprefix("torch."))
                progress.update()
            save_file(tensors, output / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for path in checkpoint.path.iterdir():
        if path.name != "manifest.json" and not path.name.startswith("rank-"):
            shutil.copyfile(path, output / path.name)
    settings = read_json(output / MODEL_FILES[0])
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    settings |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype}
    if "dtype" in settings:             # the newer name, which transformers prefers
        settings["dtype"] = dtype
    (output / MODEL_FILES[0]).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def write_adapter(checkpoint: Checkpoint, output: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, the factors in fp32."""
    if checkpoint.lora is None:
        raise ValueError(f"{checkpoint.path} was trained without LoRA: there is no adapter; leave --adapter_only out")
    tensors = {peft_name(name): checkpoint.read("parameter", name).contiguous() for name in checkpoint.shapes}
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = adapter_config(checkpoint.lora, checkpoint.manifest["model"])
    (output / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def merge(checkpoint_path: Path, output: Path, adapter_only: bool = False, model_id: str | None = None) -> None:
    """Write the merged model (or the adapter) to the new directory `output`; raises ValueError and leaves nothing behind."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already: choose another output directory, or move it away")
    checkpoint = Checkpoint(checkpoint_path)
    partial = output.with_name(output.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if adapter_only:
            write_adapter(checkpoint, partial)
        else:
            write_model(checkpoint, partial, model_id)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.merge_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a directory checkpoint-<step>")
    parser.add_argument("output", type=Path, help="the directory to write; it must not exist, or be empty")
    parser.add_argument("--adapter_only", action="store_true", help="write the LoRA adapter alone, in peft's format")
    parser.add_argument("--model_id", help="the base model, where it is no longer where training read it")
    arguments = parser.parse_args()
    try:
        merge(arguments.checkpoint, arguments.output, arguments.adapter_only, arguments.model_id)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
