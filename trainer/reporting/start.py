"""What a run is: the line that each start adds to starts.jsonl."""

from dataclasses import asdict
from datetime import datetime, timezone

from parallel.runtime import Runtime
from trainer.job import Job
from trainer.lora_settings import count_parameters
from trainer.start.facts import versions


def start_record(runtime: Runtime, job: Job, first_step: int, device: str, peak: float | None) -> dict:
    """The line of a start after `first_step` steps. `device`: a rank's, in words; `peak`: its FLOP/s."""
    trained, parameters = count_parameters(job.model_config, job.lora)
    return {
        "step": first_step,
        "total_steps": job.total_steps,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "world_size": runtime.world_size,
        "device": device,
        "device_peak_flops": peak,
        "trained_parameters": trained,
        "parameters": parameters,
        "model": job.model_reference,
        "versions": versions(),
        "flags": asdict(job.config),
    }
