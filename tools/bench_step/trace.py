"""A Chrome trace of warm training steps: what the host traces, mark_step, and what XLA:CPU executes, by name.

XLA's own profiler (torch_xla.debug.profiler) writes it as JSON for https://ui.perfetto.dev and
chrome://tracing. Each row is a thread: that of a rank shows `host tracing` and `mark_step`, those of XLA:CPU
show each product and fusion by its name in the HLO.
"""

import shutil
import tempfile
from pathlib import Path

from parallel.graph import backend
from parallel.runtime import devices

FILE = "step.trace.json.gz"


class StepTrace:
    """Records what all threads of this process do from start() to stop()."""

    def __init__(self, directory: Path):
        """Make the directory; raises ValueError on NeuronCores, and where nothing can be written to it."""
        if devices.on_neuron():
            raise ValueError(
                "--profile records XLA:CPU. On NeuronCores run trainer/main.py under "
                "NEURON_RT_INSPECT_ENABLE=1, NEURON_RT_INSPECT_DEVICE_PROFILE=1 and "
                "NEURON_RT_INSPECT_OUTPUT_DIR=DIR, and open DIR with the Neuron SDK's neuron-profile or "
                "Neuron Explorer; PJRT_DEVICE=CPU records a rehearsal here"
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                self.file = directory / FILE
        except OSError as error:
            raise ValueError(f"--profile {directory} cannot be written: {error.strerror}") from None
        self._phase = self._temporary = None

    def start(self) -> None:
        """Record from here on."""
        from torch_xla.debug.profiler import start_trace

        self._temporary = tempfile.TemporaryDirectory()
        start_trace(self._temporary.name)

    def phase(self, name: str) -> None:
        """Name what the calling thread does from here to the next phase, if steps are being recorded."""
        self._end_phase()
        if self._temporary:
            self._phase = backend.profiler_span(name)
            self._phase.__enter__()

    def _end_phase(self):
        if self._phase:
            self._phase.__exit__(None, None, None)
        self._phase = None

    def stop(self) -> None:
        """End the recording, and write it to `file`."""
        from torch_xla.debug.profiler import stop_trace

        self._end_phase()
        stop_trace()
        [written] = Path(self._temporary.name).rglob("*.trace.json.gz")
        shutil.move(written, self.file)
        self._temporary.cleanup()
        self._temporary = None
