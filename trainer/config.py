"""The flags: one frozen dataclass, from which Hugging Face's parser makes the command line.

Names and meanings are those of Hugging Face's TrainingArguments and of the LoRA tutorial for Trainium;
booleans are taken bare or with true/false.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

FLOAT32_MAX = 3.4e38
PRESETS = Path(__file__).resolve().parent / "presets"
SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def _flag(default, text: str, **argument):
    return field(default=default, metadata={"help": text, **argument})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    preset: str | None = _flag(
        None,
        "Name of a file in trainer/presets, or a file of your own, with flags; those of the command "
        "line win.",
    )
    # model
    model_id: str | None = _flag(
        None, "Directory or hub id of a Hugging Face Llama; default: a tiny one with random weights."
    )
    random_weights: bool = _flag(
        False, "Start from random weights: of --model_id, only config and tokenizer are read."
    )
    depth_scaled_init: bool = _flag(
        False, "With random weights: o_proj and down_proj are drawn sqrt(2 x layers) times smaller."
    )
    bf16: bool = _flag(
        False,
        "Weights and activations in bfloat16; the optimizer keeps fp32 master weights of what is trained.",
    )
    stochastic_rounding: bool = _flag(
        False, "With --bf16, no fp32 master weights: NeuronCores round the updated ones at random."
    )
    gradient_checkpointing: Literal["none", "selective", "full", "true", "false"] = _flag(
        "none",
        "What the backward computes again instead of keeping it: attention scores (selective), decoder layers (full).",
        nargs="?",
        const="full",
    )
    # LoRA
    lora_r: int = _flag(16, "Rank of the LoRA update; 0 trains all weights.")
    lora_alpha: float = _flag(32.0, "The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _flag(0.0, "Probability of zeroing a feature of the update's input.")
    lora_target_modules: str = _flag(
        ALL_LINEAR, "Linear layers that get an update, by Hugging Face name, separated by commas."
    )
    use_rslora: bool = _flag(False, "Scale the update by lora_alpha / sqrt(lora_r).")
    adapter_name_or_path: str | None = _flag(
        None, "Directory of a peft adapter to go on from; it sets the LoRA flags."
    )
    # data
    dataset: list[str] | None = _flag(
        None, "Files (JSONL, JSON, CSV, Parquet, text), folders or hub ids; default: the embedded sample."
    )
    dataset_weights: list[float] | None = _flag(
        None, "How often an epoch has each --dataset, such as 2 0.5; default 1 each."
    )
    format: str = _flag(
        "auto",
        "messages, prompt_completion, dolly, alpaca, text, or module:function, which makes one of these; "
        "auto takes the first whose fields a data set has.",
    )
    train_on_prompt: bool = _flag(False, "Train on all tokens, not on answers only.")
    max_samples: int | None = _flag(None, "Take only so many records of each --dataset, the first.")
    streaming: bool = _flag(False, "Read hub data sets record by record, without storing them first.")
    skip_bad: bool = _flag(
        False, "Leave records out that cannot be used, and count and name them, in place of an error."
    )
    data_cache_dir: str | None = _flag(
        None, "Where tokens are kept for the next start; default: the user's cache."
    )
    max_seq_length: int = _flag(1024, "Tokens per row.")
    long_examples: Literal["truncate", "split", "refuse"] | None = _flag(
        None, "What happens to examples longer than a row; default: truncate, and split plain text."
    )
    packing: bool = _flag(
        True, "Fill rows with several examples that do not see each other; false: an example a row, padded."
    )
    validation_split_percentage: int = _flag(5, "Per cent of the examples held out for --do_eval.")
    # parallelism
    tensor_parallel_size: int = _flag(1, "Ranks that share the weights of each layer.")
    pipeline_parallel_size: int = _flag(1, "Stages that share the layers.")
    num_microbatches: int | None = _flag(
        None,
        "Pieces of --per_device_train_batch_size on their way through the stages; default: its rows, one by one.",
    )
    parallel_layers: Literal["auto", "nxd", "native"] = _flag(
        "auto",
        "neuronx-distributed's layers (nxd) or markstep's own (native); auto: nxd where the Neuron SDK is installed and "
        "there is one stage.",
    )
    sequence_parallel: bool | None = _flag(
        None,
        "Divide norms and residuals over the tensor parallel ranks too, by position; default: where it divides.",
        nargs="?",
        const=True,
    )
    zero_1: bool = _flag(False, "Divide master weights and optimizer state over the data parallel ranks.")
    world_size: int | None = _flag(
        None, "Ranks hosted by this process on a CPU, where torchrun did not start it; default 1."
    )
    # training
    do_train: bool = _flag(True, "Train.")
    do_eval: bool = _flag(
        False, "Hold out a part of the data; report its loss before the first step and after the last."
    )
    num_train_epochs: float = _flag(3.0, "Passes over the data.")
    max_steps: int = _flag(-1, "Optimizer steps in all, in place of --num_train_epochs, where positive.")
    per_device_train_batch_size: int = _flag(1, "Rows of a micro-batch on each data parallel rank.")
    per_device_eval_batch_size: int = _flag(1, "Rows of an evaluation batch on each data parallel rank.")
    gradient_accumulation_steps: int = _flag(1, "Micro-batches of an optimizer step.")
    global_batch_size: int | None = _flag(
        None,
        "Rows of an optimizer step over all ranks; --gradient_accumulation_steps follows: the same on every cluster.",
    )
    learning_rate: float = _flag(2e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = _flag(
        "linear", "Course of the learning rate after warmup."
    )
    warmup_ratio: float = _flag(
        0.0, "Share of all steps in which the learning rate rises from 0, for every schedule."
    )
    warmup_steps: int = _flag(
        0, "Steps in which the learning rate rises, in place of --warmup_ratio, where positive."
    )
    weight_decay: float = _flag(0.0, "Decoupled weight decay of matrices (not of norms and biases).")
    adam_beta1: float = _flag(0.9, "AdamW's decay of the first moment.")
    adam_beta2: float = _flag(0.999, "AdamW's decay of the second moment.")
    adam_epsilon: float = _flag(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _flag(1.0, "Gradients are clipped to this global norm; 0 does not clip.")
    mark_step: Literal["micro_batch", "step"] = _flag(
        "micro_batch",
        "Where graphs end: a micro-batch (of stages, a tick) has one, the update another; or a step is one graph.",
    )
    on_recompile: Literal["warn", "error", "ignore"] = _flag(
        "warn",
        "When a step, micro-batch or evaluation has another graph than before: say what changed, or end the run.",
    )
    seed: int = _flag(42, "Seed of initial values, of the order of rows and of dropout.")
    # output
    output_dir: str = _flag("output", "Where checkpoints and metrics.jsonl go.")
    logging_steps: int = _flag(1, "A line in metrics.jsonl every so many steps.")
    eval_steps: int = _flag(0, "With --do_eval, evaluate every so many steps too, where positive.")
    eval_samples: int = _flag(
        0, "With --do_eval, answer so many held-out examples at each evaluation, into samples.jsonl."
    )
    save_steps: int = _flag(500, "A checkpoint every so many steps, and one after the last.")
    save_total_limit: int | None = _flag(
        None, "Keep only so many of the newest checkpoints, and the one with the least evaluation loss."
    )
    max_minutes: float | None = _flag(
        None, "Save and end before so many minutes have passed; SIGTERM does so too."
    )
    resume: str | None = _flag(
        None,
        "A checkpoint of this run to go on from, or `latest`: the newest whole one in --output_dir; "
        "where there is none yet, the run starts.",
    )

    def __post_init__(self):
        """Raise ValueError for values that no run can have."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
                raise ValueError(f"--{name} {value}: a number that fp32 can hold was expected")
        at_least = {
            "lora_r": 0,
            "max_seq_length": 2,
            "tensor_parallel_size": 1,
            "logging_steps": 1,
            "pipeline_parallel_size": 1,
            "num_microbatches": 1,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "global_batch_size": 1,
            "save_steps": 1,
            "save_total_limit": 1,
            "max_samples": 1,
            "world_size": 1,
            "warmup_steps": 0,
            "learning_rate": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "eval_steps": 0,
            "eval_samples": 0,
            "seed": 0,
            "adam_epsilon": 1e-30,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} {value}: at least {least} was expected")
        for name in ("num_train_epochs", "lora_alpha", "max_minutes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: a number above 0 was expected")
        for name in ("lora_dropout", "warmup_ratio", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: a number from 0 to below 1 was expected")
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(
                f"--validation_split_percentage {self.validation_split_percentage}: 1 to 99 was expected"
            )
        if self.dataset_weights and len(self.dataset_weights) != len(self.datasets):
            raise ValueError(
                f"--dataset_weights has {len(self.dataset_weights)} numbers for {len(self.datasets)} data sets: "
                "one each was expected"
            )
        if not all(0 < weight <= 1000 for weight in self.dataset_weights or ()):
            raise ValueError(
                f"--dataset_weights {self.dataset_weights}: numbers above 0, up to 1000, were expected"
            )
        if self.sequence_parallel and self.max_seq_length % self.tensor_parallel_size:
            raise ValueError(
                f"--max_seq_length {self.max_seq_length} is not divisible by --tensor_parallel_size "
                f"{self.tensor_parallel_size}, over which --sequence_parallel divides it"
            )
        if self.stochastic_rounding and not self.bf16:
            raise ValueError("--stochastic_rounding rounds to bfloat16: pass --bf16 too")
        if self.per_device_train_batch_size % self.microbatches:
            raise ValueError(
                f"--per_device_train_batch_size {self.per_device_train_batch_size} is not divisible by "
                f"--num_microbatches {self.microbatches}, into which it is cut"
            )
        if self.depth_scaled_init and self.random_seed is None:
            raise ValueError("--depth_scaled_init is of random weights: pass --random_weights too")
        if self.global_batch_size and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--gradient_accumulation_steps follows from --global_batch_size: choose one of them"
            )
        if self.adapter_name_or_path and not self.lora_r:
            raise ValueError(
                "--adapter_name_or_path goes on with LoRA, and --lora_r 0 trains without: choose one"
            )

    def for_ranks(self, data_parallel_size: int) -> "Config":
        """The same, with --gradient_accumulation_steps in place of --global_batch_size; ValueError where that
        is no integer."""
        if not self.global_batch_size:
            return self
        rows = self.per_device_train_batch_size * data_parallel_size
        if self.global_batch_size % rows:
            raise ValueError(
                f"--global_batch_size {self.global_batch_size} is not divisible by {rows}, the "
                f"--per_device_train_batch_size {self.per_device_train_batch_size} of {data_parallel_size} data "
                "parallel ranks"
            )
        return replace(
            self, gradient_accumulation_steps=self.global_batch_size // rows, global_batch_size=None
        )

    @property
    def ticks(self) -> int:
        """In how many ticks a micro-batch goes through the stages; 1 where there is nothing to pass on."""
        return self.microbatches + self.pipeline_parallel_size - 1

    @property
    def graph_per_micro_batch(self) -> bool:
        """Whether the micro-batches of a step, or their ticks, share graphs, and the update has another; else
        a step is one."""
        return (self.gradient_accumulation_steps > 1 or self.ticks > 1) and self.mark_step == "micro_batch"

    @property
    def graphs(self) -> dict[str, int]:
        """The graphs of a training step and how often a step executes each, in the order of their first
        execution."""
        if not self.graph_per_micro_batch:
            return {"step": 1}
        accumulation = self.gradient_accumulation_steps
        if self.ticks == 1:
            return {"micro_batch": accumulation, "update": 1}
        return {"forward": accumulation * self.ticks, "backward": accumulation * self.ticks, "update": 1}

    @property
    def mark_steps(self) -> int:
        """How many graphs a training step executes."""
        return sum(self.graphs.values())

    @property
    def divides_sequence(self) -> bool:
        """--sequence_parallel, or its default."""
        if self.sequence_parallel is None:
            return self.tensor_parallel_size > 1 and self.max_seq_length % self.tensor_parallel_size == 0
        return self.sequence_parallel

    @property
    def microbatches(self) -> int:
        """--num_microbatches, or its default."""
        return self.num_microbatches or (
            self.per_device_train_batch_size if self.pipeline_parallel_size > 1 else 1
        )

    @property
    def recompute(self) -> str:
        """none, selective or full: --gradient_checkpointing, of which bare and `true` mean full."""
        return {"true": "full", "false": "none"}.get(self.gradient_checkpointing, self.gradient_checkpointing)

    @property
    def model_directory(self) -> str:
        """--model_id, or the embedded tiny Llama."""
        return self.model_id or str(SAMPLE / "tiny")

    @property
    def datasets(self) -> list[str]:
        """--dataset, or the embedded sample."""
        return self.dataset or [str(SAMPLE / "instructions.jsonl")]

    @property
    def random_seed(self) -> int | None:
        """The seed of random weights, or None where weights are read."""
        return self.seed if self.random_weights or self.model_id is None else None


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration of a command line (default: sys.argv); exits with status 2 on unknown flags and
    unusable values."""
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(
        Config,
        prog="trainer/main.py",
        allow_abbrev=False,
        description="Train a Llama on AWS Trainium, or on virtual devices of this CPU.",
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help explains every flag\n")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", nargs="?")
    try:
        preset = chosen.parse_known_args(arguments)[0].preset
        values = vars(parser.parse_args((read_preset(preset) if preset else []) + arguments))
        return Config(**values)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def read_preset(name: str) -> list[str]:
    """The flags in trainer/presets/`name`.txt, or in the file `name`; ValueError where there is neither."""
    known = sorted(path.stem for path in PRESETS.glob("*.txt"))
    path = PRESETS / f"{name}.txt" if name in known else Path(name)
    if not path.is_file():
        raise ValueError(f"--preset {name}: {', '.join(known)}, or a file of flags, was expected")
    return shlex.split(path.read_text(encoding="utf-8"), comments=True)
