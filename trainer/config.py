"""The configuration of a run: one frozen dataclass, whose fields are the flags of the command line.

Names and meanings are those of Hugging Face's TrainingArguments and of the LoRA tutorial for Trainium.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from parallel.runtime import asks_for_bf16
from trainer.command_line import parse_flags
from trainer.config_checks import check_values
from trainer.config_derived import DerivedSettings

ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
OUTPUT_PATHS = ("output_dir", "logging_dir", "resume")
PATHS = ("preset", "model_id", "adapter_name_or_path", "dataset", "data_cache_dir", *OUTPUT_PATHS)


def _flag(default, help_text: str, **argument):
    """A field with its default, its line in --help, and further arguments of argparse's add_argument."""
    return field(default=default, metadata={"help": help_text, **argument})


@dataclass(frozen=True)
class Config(DerivedSettings):
    """All settings of a run. Raises ValueError for values that no run can have."""

    preset: str | None = _flag(
        None,
        "Name of a file in trainer/presets, or a file of your own, with flags; those of the command "
        "line win.",
    )
    # model
    model_id: str | None = _flag(
        None,
        "Directory or hub id of a Hugging Face Llama or relative; default: a tiny one with random weights.",
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
        "What the backward computes again instead of keeping it: decoder layers and logits (full), or "
        "nothing (none). Attention's scores are never kept, so selective means none.",
        nargs="?",
        const="full",
    )
    # LoRA
    lora_r: int = _flag(16, "Rank of the LoRA update; 0 trains all weights.")
    lora_alpha: float = _flag(32.0, "The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _flag(0.0, "Probability of zeroing a feature of the update's input.")
    lora_target_modules: str = _flag(
        ALL_LINEAR,
        "Linear layers that get an update: Hugging Face names, separated by commas, or as peft takes them a "
        "regular expression, or all-linear.",
    )
    use_rslora: bool = _flag(False, "Scale the update by lora_alpha / sqrt(lora_r).")
    adapter_name_or_path: str | None = _flag(
        None, "Directory of a peft adapter to go on from; it sets the LoRA flags."
    )
    # objective
    objective: Literal["sft", "dpo"] = _flag(
        "sft",
        "What is trained: to write the answers (sft), or to prefer the chosen one of two answers (dpo).",
    )
    dpo_beta: float = _flag(
        0.1, "How strongly DPO holds the model to the one that it starts from; for ipo, its tau."
    )
    dpo_loss: Literal["sigmoid", "ipo"] = _flag("sigmoid", "The loss of a pair: DPO's own, or IPO's.")
    dpo_label_smoothing: float = _flag(
        0.0, "With sigmoid, the probability that a pair's answers are the wrong way round: below 0.5."
    )
    rpo_alpha: float | None = _flag(
        None,
        "Adds so many times the chosen answer's negative log-likelihood per token to the loss of a pair.",
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
        "auto takes the first whose fields a data set has. With --objective dpo: preference.",
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
        None,
        "What happens to examples longer than a row; default: truncate, and split plain text. Those whose "
        "answer lies wholly beyond the row are left out.",
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
        "Pieces of --per_device_train_batch_size on their way through the stages; default: its rows, "
        "one by one.",
    )
    parallel_layers: Literal["auto", "nxd", "native"] = _flag(
        "auto",
        "neuronx-distributed's layers (nxd) or markstep's own (native); auto: nxd where the Neuron SDK is "
        "installed and there is one stage.",
    )
    sequence_parallel: bool | None = _flag(
        None,
        "Divide norms and residuals over the tensor parallel ranks too, by position; default: where it "
        "divides.",
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
        "Rows of an optimizer step over all ranks; --gradient_accumulation_steps follows: the same on "
        "every cluster.",
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
        "Where graphs end: a micro-batch (of stages, a tick) has one, the update another; or a step is "
        "one graph.",
    )
    replay: bool = _flag(True, "Start a known graph without tracing it again: equal to the bit, and faster.")
    on_recompile: Literal["warn", "error", "ignore"] = _flag(
        "warn",
        "When a step, micro-batch or evaluation has another graph than before: say what changed, or end "
        "the run.",
    )
    on_nonfinite: Literal["end", "skip", "ignore"] = _flag(
        "end",
        "After a step whose loss or gradient norm is not finite: end and say where it began, skip the step, "
        "or nothing.",
    )
    stall_minutes: float = _flag(
        15.0,
        "Where ranks are processes and nothing has moved for so long, eight times as long while it compiles: "
        "say which ranks are late, and write Python stacks into OUTPUT_DIR/stalls.",
    )
    on_stall: Literal["report", "end"] = _flag(
        "report", "After such a report: nothing more, or end all ranks, so that torchrun starts them again."
    )
    seed: int = _flag(42, "Seed of initial values, of the order of rows and of dropout.")
    # output
    output_dir: str = _flag("output", "Where checkpoints and metrics.jsonl go.")
    overwrite_output_dir: bool = _flag(
        False, "Move a run that --output_dir holds into its folder overwritten-1, and start anew."
    )
    logging_steps: int = _flag(1, "A line in metrics.jsonl, and in the log, every so many steps.")
    report_to: list[str] | None = _flag(None, "Curves for tensorboard, wandb or both; default: none.")
    logging_dir: str | None = _flag(None, "Where TensorBoard's files go; default: OUTPUT_DIR/runs.")
    run_name: str | None = _flag(None, "The name of the run in Weights & Biases and tools.show_run.")
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
        check_values(self)

    def for_ranks(self, data_parallel_size: int) -> "Config":
        """This configuration with --gradient_accumulation_steps in place of --global_batch_size.

        Raises ValueError where the number of accumulation steps is no integer.
        """
        if not self.global_batch_size:
            return self
        rows = self.per_device_train_batch_size * data_parallel_size
        if self.global_batch_size % rows:
            raise ValueError(
                f"--global_batch_size {self.global_batch_size} is not divisible by {rows}, the "
                f"--per_device_train_batch_size {self.per_device_train_batch_size} of {data_parallel_size} "
                "data parallel ranks"
            )
        return replace(
            self, gradient_accumulation_steps=self.global_batch_size // rows, global_batch_size=None
        )


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The configuration of a command line (default: sys.argv), in an environment that may ask for --bf16.

    Exits with status 2 and one line of error for unknown flags and unusable values.
    """
    return parse_flags(Config, arguments, ["--bf16"] if asks_for_bf16() else [], PATHS)
