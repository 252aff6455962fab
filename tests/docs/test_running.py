"""What pages show runs: the diffs of docs/changing-the-loop.md, the commands of docs/checkpoints.md."""

import math
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig
from model.weights.sources import RandomWeights
from tests.docs.pages import blocks, commands
from tests.support.on_ranks import ROOT, run_program
from tests.support.runs import environment, read

pytestmark = pytest.mark.process

PACKAGES = ("trainer", "model", "parallel", "data", "tools")
FLAGS = ["--max_seq_length", "64", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"]
CHANGES = {  # in the order of the page
    "z_loss": ["--max_steps", "1"],
    "lion": ["--max_steps", "1"],
    "frozen": ["--max_steps", "2", "--lora_r", "0"],
}
# The forked process has imported the repository's modules; these lines let it import those of its folder.
RUN = f"""
import runpy, sys
for name in [name for name in sys.modules if name.split(".")[0] in {PACKAGES}]:
    del sys.modules[name]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name of a change: a copy of the repository with it, where the embedded model has trained}."""
    changes = [
        text for language, text in blocks(ROOT / "docs" / "changing-the-loop.md") if language == "diff"
    ]
    folders = {}
    for (change, flags), diff in zip(CHANGES.items(), changes, strict=True):
        folder = folders[change] = tmp_path_factory.mktemp(change)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        applied = subprocess.run(
            ["git", "apply", "-"], cwd=folder, input=diff, text=True, capture_output=True
        )
        assert applied.returncode == 0, applied.stderr
        run(folder, "trainer/main.py", *FLAGS, *flags, "--output_dir", folder / "output")
    return folders


def run(folder, program, *arguments):
    """Run a program of a copy of the repository."""
    done = run_program(["-c", RUN, program, *arguments], folder, environment())
    assert done.returncode == 0, done.stderr[-6000:]


def test_a_z_loss_is_logged_and_has_a_gradient(folders):
    with_z_loss, without = (read(folders[change] / "output")[0] for change in ("z_loss", "lion"))
    assert with_z_loss["loss"] == pytest.approx(without["loss"], rel=1e-6)
    # The square of log(sum of exp(logits)), which of uniform logits is log 512, and more of others.
    assert math.log(512) ** 2 < with_z_loss["z_loss"] < 4 * math.log(512) ** 2
    assert 1e-6 < abs(with_z_loss["grad_norm"] / without["grad_norm"] - 1) < 0.1


def test_lion_moves_each_weight_by_the_learning_rate(folders):
    state = load_file(folders["lion"] / "output" / "checkpoint-1" / "rank-00000.safetensors")
    moved = [value for key, value in state.items() if key.startswith("parameter/") and "lora_B" in key]
    assert moved
    for value in moved:  # it begins at 0; a feature without a gradient stays
        assert (value.abs() - 1e-3).abs()[value != 0].max() < 1e-9
        assert value.count_nonzero() > 0.9 * value.numel()
    assert not any(value.any() for key, value in state.items() if key.startswith("exp_avg_sq/"))


def test_frozen_layers_are_not_saved_and_merge(folders):
    output = folders["frozen"] / "output"
    saved = load_file(output / "checkpoint-2" / "rank-00000.safetensors")
    run(folders["frozen"], "tools/merge_checkpoint/__main__.py", output / "checkpoint-2", output / "merged")
    merged = load_file(output / "merged" / "model.safetensors")
    config = ModelConfig.from_pretrained(output / "merged")
    base = RandomWeights(config, seed=42)
    for name, value in merged.items():
        frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert (f"parameter/{name}" in saved) != frozen
        assert torch.equal(value, base.read(name, tuple(map(slice, value.shape)))) == frozen, name


def test_the_commands_of_checkpoints(tmp_path):
    """Those of its first block: a run resumes on other ranks, is inspected and merged."""
    for package in PACKAGES:
        (tmp_path / package).symlink_to(ROOT / package)
    shown = [words[1:] for words in commands(ROOT / "docs" / "checkpoints.md")][:4]
    assert [words[0] for words in shown] == ["trainer/main.py", "trainer/main.py", "-m", "-m"]
    outputs = []
    for words in shown:
        done = run_program(words, tmp_path, environment())
        assert done.returncode == 0, done.stderr[-6000:]
        outputs.append(done.stdout)
    assert "resume: output/checkpoint-5, after step 5 of 10" in outputs[1]
    assert "checkpoint-10" in outputs[2]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
