"""Programs around a training run; each is run as `python -m tools.<name>`."""

import os
import signal
import sys


def end_quietly(kind, error, traceback, otherwise=sys.excepthook) -> None:
    """End a program by Ctrl-C without a traceback and with status 130, after its cleaning up has run."""
    if not issubclass(kind, KeyboardInterrupt):
        return otherwise(kind, error, traceback)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end this function
    sys.stdout.flush()
    os._exit(130)


sys.excepthook = end_quietly  # before the slow imports, which Ctrl-C may interrupt

from parallel.runtime import clean_environment, on_neuron  # noqa: E402

TAKEN_AWAY = clean_environment()  # variables, with the values that the user had given them
if not on_neuron():
    os.environ.setdefault(
        "PJRT_DEVICE", "CPU"
    )  # said before torch_xla is imported, or it warns that it has to guess
