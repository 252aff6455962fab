"""What processes must have alike is compared at the start, and the first difference ends it for all."""

import shutil
import time
from dataclasses import replace

import pytest

from model.config import ModelConfig
from model.weights.shapes import base_shapes
from model.weights.sources import SafetensorsFiles, divide
from parallel.runtime import SharedError
from tests.support.models import save_llama
from tests.support.processes import in_processes
from trainer.config import Config
from trainer.start import facts


def all_raise(found):
    """The message of the error that all processes have."""
    assert all(isinstance(error, SharedError) for error in found), found
    (message,) = {str(error) for error in found}
    return message


def test_a_flag_that_differs_is_named():
    def start(peers):
        facts.agree_on_start(peers, replace(config, seed=7) if peers.rank == 3 else config)

    config = Config()
    message = all_raise(in_processes(start, 4))
    assert message.startswith("--seed of rank 3 on host-1 is 7, and that of rank 0 on host-0 is 42")


def test_a_version_that_differs_is_named(monkeypatch):
    def start(peers):
        theirs = {"torch": "2.8.0"} if peers.rank > 1 else {}
        facts.agree(peers, "versions", facts.versions() | theirs, "install the same")

    assert (
        f"torch of rank 2 on host-1 is 2.8.0, and that of rank 0 on host-0 is {facts.versions()['torch']}: "
        "install the same (1 more ranks differ)"
    ) == all_raise(in_processes(start, 4))


def test_changed_source_files_are_another_version(monkeypatch, tmp_path):
    for folder in facts.SOURCES:
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    before = facts._source_files()
    (tmp_path / "trainer" / "loop.py").write_text("step = 1")
    assert facts._source_files() != before


def test_a_clock_is_only_warned_of(capsys):
    def start(peers):
        facts._compare_clocks(peers, lambda: time.time() + (3600 if peers.rank > 1 else 0))

    assert in_processes(start, 4) == [None] * 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: the clock of rank 2 on host-1 is 3600 s ahead of that of rank 0 on host-0"
    )


@pytest.fixture
def machines(tmp_path):
    """A model on the disks of two machines."""
    save_llama(tmp_path / "host-0" / "model")
    shutil.copytree(tmp_path / "host-0", tmp_path / "host-1")
    return [tmp_path / name / "model" for name in ("host-0", "host-1")]


def change_nothing(model):
    pass


def change_config(model):
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")


def change_header(model):
    """The file has another header of the same length, and the same sizes and shapes."""
    file = sorted(model.glob("*.safetensors"))[0]
    content = file.read_bytes()
    assert content.count(b'"format":"pt"') == 1
    file.write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"'))


@pytest.mark.parametrize(
    "change, named",
    [(change_nothing, None), (change_config, "model/config.json"), (change_header, "model/model-00001-of-")],
)
def test_a_file_of_the_model_that_differs_is_named(machines, change, named):
    def start(peers):
        directory = machines[peers.rank // 2]
        facts.agree_on_model(peers, {directory: SafetensorsFiles(directory)})

    change(machines[1])
    found = in_processes(start, 4)
    if named:
        message = all_raise(found)
        assert message.startswith(named) and "of rank 2 on host-1 is" in message and "checksum" in message
    else:
        assert found == [None] * 4


def test_the_base_is_hashed_by_all_and_the_hash_is_that_of_one(machines):
    files = SafetensorsFiles(machines[0])
    shapes = base_shapes(ModelConfig.from_pretrained(machines[0]))
    read = [[] for _ in range(4)]

    def start(peers):
        mine = SafetensorsFiles(machines[0])
        file = next(iter(mine._file_of.values()))

        class Recorded(type(file)):
            def chunks(self, name):
                read[peers.rank].append(name)
                return super().chunks(name)

        for each in set(mine._file_of.values()):
            each.__class__ = Recorded
        return mine.fingerprint(shapes, peers)

    assert in_processes(start, 4) == [files.fingerprint(shapes)] * 4
    assert sorted(sum(read, [])) == sorted(shapes) and all(read)


def test_tensors_are_divided_by_bytes_and_over_machines():
    sizes = {f"w{number}": size for number, size in enumerate((8, 7, 6, 5, 4, 3, 2, 1))}
    parts = divide(sizes, 4, 2)
    assert sorted(sum(parts, [])) == sorted(sizes)
    assert [sum(sizes[name] for name in part) for part in parts] == [9, 9, 9, 9]
    # The two largest are on different machines.
    assert [parts[0][0], parts[2][0]] == ["w0", "w1"]


def test_a_nan_that_one_process_finds_is_the_error_of_all(machines):
    import torch
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    path = SafetensorsFiles(machines[0])._file_of[name].path
    tensors = load_file(path)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    shapes = base_shapes(ModelConfig.from_pretrained(machines[0]))
    message = all_raise(
        in_processes(lambda peers: SafetensorsFiles(machines[0]).fingerprint(shapes, peers), 4)
    )
    assert f"the weight {name} has values that are NaN" in message and message.startswith("rank ")
