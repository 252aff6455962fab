"""The settings that compiled graphs depend on: flags of the trainer, and flags of the compiler."""

import re
from collections.abc import Mapping
from pathlib import Path

from trainer.config import Config

# The values of these flags are data of a graph, or do not reach the device. All other flags, also those that
# are yet to come, are taken to change the graph.
NOT_IN_THE_GRAPH = (
    "replay",
    "random_weights",
    "depth_scaled_init",
    "adapter_name_or_path",
    "dataset",
    "dataset_weights",
    "format",
    "train_on_prompt",
    "max_samples",
    "streaming",
    "skip_bad",
    "data_cache_dir",
    "long_examples",
    "validation_split_percentage",
    "do_train",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "on_recompile",
    "seed",
    "output_dir",
    "overwrite_output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "max_minutes",
    "resume",
)
# Flags in NEURON_CC_FLAGS that the cache reads, and the compiler does not.
WRAPPER_FLAGS = re.compile(r"--(cache_dir|log_level)[= ]\S+|--(no_cache|retry_failed_compilation)\b")


def key_of(config: Config, environment: Mapping[str, str]) -> dict:
    """{setting: value} of the settings that change graphs; raises ValueError without --world_size."""
    if not config.world_size:
        raise ValueError(
            "--world_size: the number of ranks that the graphs are for was expected (processes x nodes)"
        )
    flags = {name: value for name, value in vars(config).items() if name not in NOT_IN_THE_GRAPH}
    flags |= {
        "model_id": Path(config.model_directory).name,
        "gradient_checkpointing": config.checkpointing_mode,
        "sequence_parallel": config.divides_sequence,
    }
    compiler_flags = " ".join(sorted(WRAPPER_FLAGS.sub("", environment.get("NEURON_CC_FLAGS", "")).split()))
    return flags | {
        "NEURON_CC_FLAGS": compiler_flags,
        "NEURON_FUSE_SOFTMAX": environment.get("NEURON_FUSE_SOFTMAX", ""),
    }
