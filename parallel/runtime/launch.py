"""`launch(function, world_size)` runs `function(runtime)` on every rank."""

import os
import signal
from collections.abc import Callable

from parallel.runtime import devices
from parallel.runtime.processes import launch_process
from parallel.runtime.rank import Runtime
from parallel.runtime.threads import launch_threads


def launch(function: Callable[[Runtime], object], world_size: int) -> None:
    """Run `function(runtime)` on every rank. The first error of any rank ends the others and is raised.

    From here on Ctrl-C ends the process at once, with status 130: ranks that wait for each other in a
    collective cannot be unwound.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if devices.ranks_are_processes():
        launch_process(function)
    else:
        launch_threads(function, world_size)
