"""What a run is: the line that each start adds to starts.jsonl."""

from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from parallel.runtime import Runtime
from trainer.job import Job
from trainer.lora_settings import count_parameters

PACKAGES = ("markstep", "torch", "torch_xla", "torch_neuronx", "transformers")


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
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "flags": asdict(job.config),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
