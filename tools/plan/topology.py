"""A topology, as a Config describes it: its name, and the rows of a step."""


def topology_name(config) -> str:
    """A topology in a few words, such as `TP8 x PP2 x DP2, 1 x 4 in 5 ticks x 3 rows, ZeRO-1`.

    The rows of a step on one data parallel rank are those of a pipeline micro-batch x pipeline micro-batches
    x accumulation steps.
    """
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    dp = config.world_size // tp // pp
    stages = f" x PP{pp}" if pp > 1 else ""
    ticks = f"{config.pipeline_microbatches} in {config.ticks} ticks x " if config.ticks > 1 else ""
    rows = (
        f"{config.per_device_train_batch_size // config.pipeline_microbatches} x "
        f"{ticks}{config.gradient_accumulation_steps} rows"
    )
    recomputed = ", layers recomputed" if config.checkpointing_mode == "full" else ""
    zero_1 = ", ZeRO-1" if config.zero_1 else ""
    return f"TP{tp}{stages} x DP{dp}, {rows}{recomputed}{zero_1}"


def rows_per_step(config) -> int:
    """The rows of an optimizer step over all ranks."""
    dp = config.world_size // config.tensor_parallel_size // config.pipeline_parallel_size
    return dp * config.per_device_train_batch_size * config.gradient_accumulation_steps
