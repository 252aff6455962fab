"""Checks of the flags' values that need nothing but the flags themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import Config

FLOAT32_MAX = 3.4e38
AT_LEAST = {
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
    "rpo_alpha": 0,
}
ABOVE_ZERO = ("num_train_epochs", "lora_alpha", "max_minutes", "dpo_beta", "stall_minutes")
REPORT_TO = ("none", "tensorboard", "wandb")
FROM_ZERO_TO_BELOW_ONE = ("lora_dropout", "warmup_ratio", "adam_beta1", "adam_beta2")


def check_values(config: Config) -> None:
    """Raise ValueError, which names the flag and the mend, for values that no run can have."""
    _check_ranges(config)
    _check_dataset_weights(config)
    _check_divisibility(config)
    _check_combinations(config)
    _check_objective(config)


def _check_ranges(config: Config) -> None:
    """Each number is in the range of its flag."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
            raise ValueError(f"--{name} {value}: a number that fp32 can hold was expected")
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: at least {least} was expected")
    for name in ABOVE_ZERO:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value}: a number above 0 was expected")
    for name in FROM_ZERO_TO_BELOW_ONE:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"--{name} {value}: a number from 0 to below 1 was expected")
    percentage = config.validation_split_percentage
    if not 1 <= percentage <= 99:
        raise ValueError(f"--validation_split_percentage {percentage}: 1 to 99 was expected")


def _check_dataset_weights(config: Config) -> None:
    """There is one weight per data set, and each is positive."""
    weights, datasets = config.dataset_weights or [], config.datasets
    if weights and len(weights) != len(datasets):
        raise ValueError(
            f"--dataset_weights has {len(weights)} numbers for {len(datasets)} data sets: "
            "one each was expected"
        )
    if not all(0 < weight <= 1000 for weight in weights):
        raise ValueError(f"--dataset_weights {weights}: numbers above 0, up to 1000, were expected")


def _check_divisibility(config: Config) -> None:
    """Rows and positions can be cut into equal parts."""
    if config.sequence_parallel and config.max_seq_length % config.tensor_parallel_size:
        raise ValueError(
            f"--max_seq_length {config.max_seq_length} is not divisible by --tensor_parallel_size "
            f"{config.tensor_parallel_size}, over which --sequence_parallel divides it"
        )
    if config.per_device_train_batch_size % config.pipeline_microbatches:
        raise ValueError(
            f"--per_device_train_batch_size {config.per_device_train_batch_size} is not divisible by "
            f"--num_microbatches {config.pipeline_microbatches}, into which it is cut"
        )


def _check_combinations(config: Config) -> None:
    """No flag contradicts another, or has no effect without it."""
    unknown = [name for name in config.report_to or () if name not in REPORT_TO]
    if unknown or config.report_to and "none" in config.report_to and len(config.report_to) > 1:
        given = " ".join(config.report_to)
        raise ValueError(f"--report_to {given}: none, tensorboard, wandb, or tensorboard wandb was expected")
    if config.overwrite_output_dir and config.resume:
        raise ValueError("--overwrite_output_dir starts anew, and --resume goes on: choose one of them")
    if config.stochastic_rounding and not config.bf16:
        raise ValueError("--stochastic_rounding rounds to bfloat16: pass --bf16 too")
    if config.depth_scaled_init and config.random_seed is None:
        raise ValueError("--depth_scaled_init is of random weights: pass --random_weights too")
    if config.global_batch_size and config.gradient_accumulation_steps > 1:
        raise ValueError("--gradient_accumulation_steps follows from --global_batch_size: choose one of them")
    if config.adapter_name_or_path and not config.lora_r:
        raise ValueError(
            "--adapter_name_or_path goes on with LoRA, and --lora_r 0 trains without: choose one"
        )


def _check_objective(config: Config) -> None:
    """The flags of an objective go with it."""
    if not 0 <= config.dpo_label_smoothing < 0.5:
        raise ValueError(
            f"--dpo_label_smoothing {config.dpo_label_smoothing}: a number from 0 to below 0.5 was expected"
        )
    if config.dpo_label_smoothing and config.dpo_loss != "sigmoid":
        raise ValueError(f"--dpo_label_smoothing is of --dpo_loss sigmoid; this is {config.dpo_loss}")
    if not config.trains_on_pairs:
        defaults = {"dpo_beta": 0.1, "dpo_loss": "sigmoid", "dpo_label_smoothing": 0.0, "rpo_alpha": None}
        for name, default in defaults.items():
            if getattr(config, name) != default:
                raise ValueError(f"--{name} is of --objective dpo: pass that too")
        return
    if config.train_on_prompt:
        raise ValueError("--train_on_prompt has no meaning with --objective dpo: answers are compared")
    if config.long_examples in ("truncate", "split"):
        raise ValueError(
            f"--long_examples {config.long_examples}: with --objective dpo pairs are never cut: those that "
            "do not fit into a row are left out, or refused (--long_examples refuse)"
        )
