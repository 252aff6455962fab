"""The launch files come with an installed package, and work where they are copied to."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.on_ranks import ROOT
from tools import launch_files

BUILD = "from setuptools import setup; setup(script_args=['-q', 'build_py', '-d', '{}'])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a wheel would install: build_py puts there what the wheel packs. Built from a copy, as it also
    writes into its source."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("tools", "trainer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD.format(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.process
def test_a_package_has_all_files(installed):
    tracked = {
        path.relative_to(ROOT).as_posix()
        for folder in launch_files.FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert tracked <= found and "tools/launch/kubernetes/train.yaml" in tracked


@pytest.mark.process
def test_copied_scripts_start_the_installed_trainer(installed, tmp_path, monkeypatch, capsys):
    for script in (installed / "tools" / "launch").rglob("*.sh"):
        script.chmod(0o644)  # as pip leaves it
    monkeypatch.setattr(launch_files, "SOURCE", installed)
    there = tmp_path / "mine"
    assert launch_files.main([str(there)]) == 0
    copied = {path.relative_to(there) for path in there.rglob("*") if path.is_file()}
    assert copied == set(launch_files.files()) and not {"docker.sh", "Dockerfile"} & {
        path.name for path in copied
    }
    assert f"wrote {len(copied)} files" in capsys.readouterr().out
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("python", "torchrun"):
        (binaries / name).write_text(f'#!/bin/sh\n[ {name} = python ] || echo "$PWD: $*"\n')
        (binaries / name).chmod(0o755)
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "PHASE": "train"}
    done = subprocess.run(
        [there / "tools/launch/trn1.sh"], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert done.stdout.startswith(f"{there}: --nproc_per_node 32 -m trainer.main --model_id"), done.stderr


def test_nothing_is_overwritten(tmp_path, capsys):
    assert launch_files.main([str(tmp_path)]) == 0 and launch_files.main([str(tmp_path)]) == 0
    assert "wrote 0 files" in capsys.readouterr().out
    changed = tmp_path / "tools/launch/kubernetes/train.yaml"
    changed.write_text("mine")
    (tmp_path / "tools/launch/trn1.sh").unlink()
    assert launch_files.main([str(tmp_path)]) == 1
    assert f"error: {changed} exists, and differs" in capsys.readouterr().err
    assert changed.read_text() == "mine" and not (tmp_path / "tools/launch/trn1.sh").exists()
    assert os.access(tmp_path / "tools/launch/node.sh", os.X_OK)
