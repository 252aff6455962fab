"""prepare() in several processes: all get the job that one process would have, and an error ends all."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from torch.distributed import TCPStore

from tests.support.models import save_llama
from tests.support.on_ranks import ROOT
from tests.support.processes import in_processes
from tests.support.runs import environment
from trainer import job
from trainer.config import Config

HOST = socket.gethostname()
FLAGS = ["--max_seq_length", "64", "--parallel_layers", "native"]
PROGRAM = """
import sys
from parallel.runtime import devices
devices.on_neuron = lambda: True
import trainer.main
trainer.main.launch = None
sys.exit(trainer.main.main())
"""


def test_all_processes_get_the_job_of_one(base, tmp_path, monkeypatch):
    def config(name):
        return replace(Config(), model_id=str(base), output_dir=str(tmp_path / name), max_seq_length=64)

    alone = job.prepare(config("alone"), 4)
    mine = threading.local()
    one = threading.Lock()  # transformers' import is not made for threads

    def process(peers):
        mine.peers = peers
        return job.prepare(config("all"), 4)

    def tokenizer(directory):
        with one:
            return load(directory)

    load = job.load_tokenizer
    monkeypatch.setattr(job, "load_tokenizer", tokenizer)
    monkeypatch.setattr(job, "meet", lambda: mine.peers)
    for found in in_processes(process, 4):
        assert found.identity == alone.identity and found.identity["base"]
        assert found.total_steps == alone.total_steps and found.summary == alone.summary
        assert found.flash_attention is False
        assert found.train_rows.tokens[0].directory == alone.train_rows.tokens[0].directory


@pytest.mark.process
def test_a_shard_that_one_machine_lacks_ends_all(tmp_path):
    """--model_id is a path on each machine's own disk."""
    save_llama(tmp_path / "0" / "model")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    lost = sorted((tmp_path / "1" / "model").glob("model-*.safetensors"))[-1]
    lost.unlink()
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "--model_id", "model", *FLAGS],
            env=environment() | shared | {"RANK": str(rank), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path / str(rank),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    problem = f"model/{lost.name} cannot be read: [Errno 2] No such file or directory: 'model/{lost.name}'"
    assert f"error: rank 1 on {HOST}: {problem}" in said[1].splitlines()
    assert f"error: rank 1 on {HOST} has failed: {problem}; rank 0 on {HOST} ends with it" in said[0]
    assert "Traceback" not in "".join(said) and not os.path.exists(tmp_path / "0" / "output")
