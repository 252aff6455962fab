"""A manifest that says what its files do not hold: one line of error from every program that reads it, and
nothing is read outside the directory."""

import copy
import random
import shutil

import pytest

from model.weights.hub import read_json
from tests.support.saved import forge, save
from tests.trainer.test_faults import save_tiny
from tools.inspect_checkpoint.__main__ import main as inspect
from tools.merge_checkpoint.merging import merge
from tools.model_source import ModelSource
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.names import MANIFEST
from trainer.checkpoint.reader import Checkpoint

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q"], "use_rslora": False}
COLUMN, NORM = "parameter/column.weight", "parameter/norm.weight"


def put(*path_and_value):
    """A change of a manifest: the value at a path of names and indices."""

    def change(manifest):
        *path, last, value = path_and_value
        for name in path:
            manifest = manifest[name]
        manifest[last] = value

    return change


def add_file(name):
    return put("files", name, {"bytes": 6, "checksum": "0"})


def without(*path):
    def change(manifest):
        *outer, last = path
        for name in outer:
            manifest = manifest[name]
        del manifest[last]

    return change


def no_parts(manifest):
    for key in (COLUMN, "exp_avg/column.weight", "exp_avg_sq/column.weight"):
        manifest["tensors"][key] |= {"parts": 0, "ranks": []}


def fewer_parts(manifest):
    """9 rows in 2 parts of 4: one row of the tensor would never be read."""
    for key in (COLUMN, "exp_avg/column.weight", "exp_avg_sq/column.weight"):
        manifest["tensors"][key]["global_shape"] = [9, 6]


def swapped_parts(manifest):
    """Both parts are whole, and their checksums are right: only the files know which is which."""
    manifest["tensors"][COLUMN]["ranks"].reverse()


def a_whole_among_parts(manifest):
    for key in (NORM, "exp_avg/norm.weight", "exp_avg_sq/norm.weight"):
        manifest["tensors"][key]["parts"] = 2
        manifest["tensors"][key]["ranks"] *= 2


FORGED = [
    (add_file("../secret.txt"), "'a name in files' is '../secret.txt'; a path within the checkpoint"),
    (add_file("/etc/passwd"), "'/etc/passwd'; a path within the checkpoint"),
    (add_file("a/../../secret.txt"), "a path within the checkpoint"),
    (add_file("rank-1/../../secret.txt"), "a path within the checkpoint"),
    (add_file("a\nb"), "a path within the checkpoint"),
    (add_file("\ud800"), "a path within the checkpoint"),
    (put("files", "config.json", "bytes", -1), "'files.config.json'"),
    (put("files", "config.json", None), "'files.config.json' is None"),
    (put("files", []), "'files' is []; an object"),
    (put("tensors", {}), "'tensors' is {}; a tensor"),
    (put("step", "7"), "'step' is '7'; an integer"),
    (put("step", True), "'step' is True"),
    (put("step", -1), "'step' is -1"),
    (put("step", 1e400), "'step' is inf"),
    (without("step"), "'step' is None"),
    (put("position", {}), "'position.epoch' is None"),
    (put("position", "row", 1.5), "'position.row' is 1.5"),
    (put("position", "x", 1), "'position.epoch' is 1"),
    (put("eval_loss", "low"), "'eval_loss' is 'low'; a number or null"),
    (put("eval_loss", float("nan")), "'eval_loss' is nan"),
    (put("world_size", 5), "'world_size' is 5; 4, the product"),
    (put("tensor_parallel_size", 0), "'tensor_parallel_size' is 0"),
    (put("pipeline_parallel_size", "1"), "'pipeline_parallel_size' is '1'"),
    (put("identity", None), "'identity' is None"),
    (without("identity", "lora"), "'identity.lora' is 'none'"),
    (put("identity", "lora", LORA | {"r": 0}), "'identity.lora.r' is 0"),
    (put("identity", "lora", LORA | {"more": 0}), "not LoRA's settings"),
    (put("identity", "lora", LORA | {"target_modules": [1]}), "'identity.lora.target_modules'"),
    (put("model", ["tiny"]), "'model' is ['tiny']"),
    (put("random_seed", "42"), "'random_seed' is '42'"),
    (put("config", None), "'config' is None"),
    (no_parts, f"'{COLUMN}.parts' is 0"),
    (fewer_parts, "of part 0 of parameter/column.weight, the files hold 24 of 30 elements"),
    (swapped_parts, "rank-00001.safetensors says something else of part 0 of parameter/column.weight"),
    (a_whole_among_parts, f"'{NORM}.dim' is None"),
    (without("tensors", NORM, "dim"), f"'{NORM}.dim' is None"),
    (put("tensors", COLUMN, "dim", 2), f"'{COLUMN}.dim' is 2"),
    (put("tensors", COLUMN, "dim", -1), f"'{COLUMN}.dim' is -1"),
    (put("tensors", COLUMN, "global_shape", [8, 6.0]), f"'{COLUMN}.global_shape' is [8, 6.0]"),
    (put("tensors", COLUMN, "global_shape", [2**40, 2**40]), f"'{COLUMN}.global_shape'"),
    (put("tensors", COLUMN, "global_shape", [-8, -6]), f"'{COLUMN}.global_shape'"),
    (put("tensors", COLUMN, "replicas", 0), f"'{COLUMN}.parts'"),
    (put("tensors", COLUMN, "dtype", "BF16"), f"'{COLUMN}.dtype' is 'BF16'"),
    (put("tensors", COLUMN, "ranks", 0, 0, 0, "0"), f"'{COLUMN}.ranks'"),
    (put("tensors", COLUMN, "ranks", 0, 0, 2, 0), f"'{COLUMN}.ranks'"),
    (put("tensors", COLUMN, "ranks", 0, 0, 1, 2**60), f"'{COLUMN}.ranks'"),
    (put("tensors", COLUMN, "ranks", 0, 0, [7, 8, 1]), "a piece is in rank-00007.safetensors, which"),
    (put("tensors", COLUMN, "piece", 23), "of part 0 of parameter/column.weight, the files hold 23 of 24"),
    (put("tensors", "weight", {}), "'a key in tensors' is 'weight'"),
    (without("tensors", "exp_avg/column.weight"), "'exp_avg/column.weight' is None; the parameter's shape"),
]


@pytest.mark.parametrize("change, problem", FORGED, ids=[problem[-40:] for _, problem in FORGED])
def test_a_forged_manifest_is_refused(tmp_path, capsys, change, problem):
    path = save(tmp_path / "out", 7)
    (tmp_path / "secret.txt").write_text("secret")
    forge(path, change)
    with pytest.raises(ValueError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert problem in message and str(path) in message and "\n" not in message and len(message) < 400
    with pytest.raises(ValueError):
        find_checkpoint(str(tmp_path / "out"), "latest")
    assert inspect([str(path)]) == 1
    assert problem in capsys.readouterr().err


def places(value, path=()):
    """The paths of all values in a manifest."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


ODD = [
    None,
    True,
    0,
    1,
    -1,
    3,
    2**63,
    10**40,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "../..",
    "\n",
    [],
]
ODD += [
    {},
    [[]],
    [None],
    {"a": None},
    "rank-00001.safetensors",
    "config.json",
    "/etc/passwd",
    "\ud800",
    "F32",
]


def mutate(manifest, chance):
    """Change one value somewhere: put an odd one there, take it away, or put another of its kin there."""
    path = chance.choice(list(places(manifest))[1:])
    *outer, last = path
    inner = manifest
    for name in outer:
        inner = inner[name]
    how = chance.random()
    if how < 0.15:
        del inner[last]
    elif how < 0.35:
        inner[last] = copy.deepcopy(chance.choice(list(inner.values() if isinstance(inner, dict) else inner)))
    elif how < 0.45 and isinstance(inner, list):
        inner.append(copy.deepcopy(inner[last]))
    elif how < 0.5 and isinstance(inner, dict):
        inner[str(chance.choice(ODD))] = inner.pop(last)
    elif how < 0.6 and type(inner[last]) is int:
        inner[last] += chance.choice([-1, 1, 8])
    else:
        inner[last] = copy.deepcopy(chance.choice(ODD))


def readers(checkpoint, output):
    """Each program that reads a checkpoint, up to where it has all of its bytes."""
    return {
        "resume": lambda: find_checkpoint(str(checkpoint.parent), str(checkpoint)),
        "inspect": lambda: inspect([str(checkpoint)]),
        "inspect the folder": lambda: inspect([str(checkpoint.parent)]),
        "compare": lambda: inspect([str(checkpoint), str(checkpoint)]),
        "merge": lambda: merge(checkpoint, output, verify=True),
        "generate and evaluate": lambda: ModelSource.of_checkpoint(checkpoint),
    }


@pytest.mark.parametrize("seed", range(60))
def test_manifests_changed_at_random(tmp_path_factory, seed, tmp_path):
    """Every reader works, or ends in one line."""
    original = tmp_path_factory.getbasetemp() / "tiny" / "checkpoint-3"
    if not original.exists():
        save_tiny(original.parent, 3)
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(original, checkpoint)
    chance, manifest = random.Random(seed), read_json(original / MANIFEST)
    for _ in range(10):
        changed = copy.deepcopy(manifest)
        for _ in range(chance.choice([1, 1, 2])):
            mutate(changed, chance)
        forge(checkpoint, lambda _, changed=changed: changed)
        try:
            Checkpoint(checkpoint)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            continue
        for number, (name, read) in enumerate(readers(checkpoint, tmp_path / "merged").items()):
            try:
                read()
            except (ValueError, OSError) as error:
                assert "\n" not in str(error), (name, number, error)
            shutil.rmtree(tmp_path / "merged", ignore_errors=True)
