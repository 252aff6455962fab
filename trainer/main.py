"""The training command: it reads the flags, prepares the job and starts the ranks.

torchrun --nproc_per_node=N trainer/main.py ...
python trainer/main.py --world_size N ...
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

BEGUN = time.monotonic()  # before the slow imports

# Ctrl-C ends the process at once. Ranks that wait for each other in a collective cannot be unwound, and need
# not be: a checkpoint only gets its name when it is complete.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# A clone runs without being installed. Python has put trainer/ first, but modules are imported as trainer.*.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from parallel.graph.guard import NewGraph  # noqa: E402
from parallel.runtime import (  # noqa: E402
    GraphMismatch,
    clean_environment,
    extracts_graphs,
    launch,
    leaves_at_once,
    meet,
    prepare_environment,
    requested_world_size,
    use_huge_pages,
    watch_job,
    watch_stalls,
)


def main() -> int:
    """Run one job. Returns the exit status: 0, or 1 after an error of one line (130 after Ctrl-C)."""
    try:
        if leaves_at_once():
            return 0
        clean_environment()
        use_huge_pages()
        from trainer.config import parse

        config = parse()
        world_size = requested_world_size(config.world_size)
        prepare_environment(world_size, config.stochastic_rounding)
        watch = watch_job()  # from here on an error of any process ends all
        watch_stalls(meet(), config.output_dir, config.stall_minutes, config.on_stall == "end")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if meet().world_size > 1:
        signal.signal(signal.SIGTERM, watch.terminated)
    try:
        with watch.telling():
            from trainer.checkpoint.names import NonFinite
            from trainer.job import lock, make_way, prepare
            from trainer.loop import run

            job = prepare(config, world_size, BEGUN)
            lock(config.output_dir)
            if config.overwrite_output_dir:
                make_way(config)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {watch.in_words(error)}", file=sys.stderr)
        return 1
    if not extracts_graphs():
        signal.signal(signal.SIGTERM, job.stop_request.make)
    # From here on, a ValueError is a bug in the loop, not bad input: it keeps its traceback.
    try:
        with watch.telling():
            launch(lambda runtime: run(runtime, job), world_size)
    except (GraphMismatch, NewGraph, NonFinite, OSError, MemoryError) as error:
        print(f"error: {watch.in_words(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from trainer.reporting.console import Log

    sys.stdout, sys.stderr = Log(sys.stdout), Log(sys.stderr)
    status = main()
    if status:
        # After an error ranks may still be computing. XLA may abort a process that is taken down meanwhile,
        # with a status and a message of its own.
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
