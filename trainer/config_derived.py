"""What follows from the flags of a run: graphs, ticks, and the values that stand for a default."""

from __future__ import annotations

from pathlib import Path

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"


class DerivedSettings:
    """The part of trainer.config.Config that has no fields."""

    @property
    def ticks(self) -> int:
        """The ticks (clock steps of the pipeline) of one accumulation step; 1 where there is no pipeline."""
        return self.pipeline_microbatches + self.pipeline_parallel_size - 1

    @property
    def graph_per_micro_batch(self) -> bool:
        """Whether accumulation steps (or their ticks) share graphs and the update has its own graph.

        Otherwise a whole step is one graph.
        """
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

    def evaluates_after(self, step: int, saves: bool) -> bool:
        """Whether --do_eval evaluates after so many steps. The best checkpoint of --save_total_limit is known
        only where every checkpoint has its loss."""
        return bool(self.eval_steps and step % self.eval_steps == 0 or saves and self.save_total_limit)

    @property
    def divides_sequence(self) -> bool:
        """The value of --sequence_parallel; by default, whether the ranks divide a row evenly."""
        if self.sequence_parallel is None:
            return self.tensor_parallel_size > 1 and self.max_seq_length % self.tensor_parallel_size == 0
        return self.sequence_parallel

    @property
    def pipeline_microbatches(self) -> int:
        """The number of pipeline micro-batches that the rows of an accumulation step are cut into."""
        return self.num_microbatches or (
            self.per_device_train_batch_size if self.pipeline_parallel_size > 1 else 1
        )

    @property
    def trains_on_pairs(self) -> bool:
        """Whether the records of the data are preference pairs."""
        return self.objective == "dpo"

    @property
    def checkpointing_mode(self) -> str:
        """The value of --gradient_checkpointing as none or full."""
        return "full" if self.gradient_checkpointing in ("full", "true") else "none"

    @property
    def model_directory(self) -> str:
        """The value of --model_id; by default, the directory of the embedded tiny Llama."""
        return self.model_id or str(SAMPLE / "tiny")

    @property
    def datasets(self) -> list[str]:
        """The values of --dataset; by default, the file of the embedded sample."""
        return self.dataset or [str(SAMPLE / "instructions.jsonl")]

    @property
    def random_seed(self) -> int | None:
        """The seed of random weights, or None where weights are read from files."""
        return self.seed if self.random_weights or self.model_id is None else None
