"""Runs a function on N ranks, or a program, in a process of its own: XLA's world is fixed once per process.

Such a process is forked from a server that has imported torch, torch_xla and transformers and has not started
XLA. It costs less than a second where a new interpreter costs five.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 900
# With this variable a program does not start itself anew (parallel.runtime.use_huge_pages).
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def on_ranks(function, world_size: int, **arguments) -> list:
    """[function(runtime, **arguments) of rank 0, of rank 1, ...]. Arguments are moved as JSON, results by
    torch.save."""
    import torch

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "results.pt"
        done = _forked(
            os.environ,
            _launch,
            function.__module__,
            function.__name__,
            world_size,
            json.dumps(arguments),
            out,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return torch.load(out, weights_only=False)


def run_program(command: list, cwd: Path = ROOT, environment=os.environ) -> subprocess.CompletedProcess:
    """What `python *command` does. The status is not checked.

    command: a file, "-m" and a module, or "-c" and a text; then arguments.
    """
    return _forked(environment, _run, [str(each) for each in command], cwd)


def _forked(environment, function, *arguments) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory) / name for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        process = _server().Process(target=_child, args=(dict(environment), outputs, function, arguments))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, SECONDS)
        return subprocess.CompletedProcess(
            arguments, process.exitcode, *(path.read_text() for path in outputs)
        )


def _server():
    """The multiprocessing context whose processes are forked from a server, which runs from the first call
    on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    before = dict(os.environ)
    try:
        os.environ |= HUGE_PAGES | {"PYTHONPATH": str(ROOT)}  # it starts without this process's sys.path
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _child(environment, outputs, function, arguments):
    """In the forked process."""
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment | HUGE_PAGES)
    import torch_xla

    torch_xla._setup_default_env()  # what its import added to the environment
    torch_xla._setup_xla_flags()
    function(*arguments)


def _launch(module, name, world_size, arguments, out):
    from parallel.runtime import launch, prepare_environment

    prepare_environment(world_size)
    import torch

    function = getattr(importlib.import_module(module), name)
    results = [None] * world_size

    def program(runtime):
        results[runtime.rank] = function(runtime, **json.loads(arguments))

    launch(program, world_size)
    torch.save(results, out)


def _run(command, cwd):
    os.chdir(cwd)
    if command[0] == "-m":
        sys.argv, sys.path = command[1:], [str(cwd), *sys.path]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv, sys.path = ["-c", *command[2:]], [str(cwd), *sys.path]
        exec(command[1], vars(sys.modules["__main__"]))
    else:
        sys.argv, sys.path = command, [str(Path(command[0]).parent), *sys.path]
        runpy.run_path(command[0], run_name="__main__")
