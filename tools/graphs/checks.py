"""What bench_compile and plan refuse before they trace a step."""

import os
from pathlib import Path

REFUSED = {
    "model_id": "--model names the model",
    "adapter_name_or_path": "the flags of LoRA say what is trained",
    "resume": "a step does not depend on what was trained before",
    "do_eval": "the training step alone is traced",
}


def check_flags(config) -> None:
    """Raise ValueError for a flag of the trainer that has no meaning for the graphs of a step."""
    for flag, reason in REFUSED.items():
        if getattr(config, flag):
            raise ValueError(f"--{flag} is not taken here: {reason}")


def check_file(flag: str, path: str | None) -> None:
    """Raise ValueError where the result that `flag` names could not be written at the end."""
    if path is None:
        return
    directory = Path(path).parent
    if Path(path).is_dir() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: a file in a directory that exists was expected")
