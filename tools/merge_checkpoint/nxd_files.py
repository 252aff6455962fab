"""The files of neuronx-distributed's sharded checkpoints, found and read by rows.

What the files hold was taken from neuronx-distributed 0.18 (Neuron SDK 2.29). Each tensor and pipeline
parallel rank has a file with its part of the model, {name: tensor}; of the data parallel ranks only the first
writes.

    <tag>/model/dp_rank_00_tp_rank_00_pp_rank_00.pt     trainer/checkpoint.py: nxd.save_checkpoint
    <dir>/tp_rank_00_pp_rank_00/checkpoint.pt           parallel_layers/checkpointing.py, and Lightning:
                                                        the part is the value of "model" or "state_dict"
    <dir>/tp_rank_00_pp_rank_00                         the same in the form with xser

With xser, a file holds torch_xla.utils.serialization.TensorReference(n) instead of a tensor, and the tensor
is in <file>.tensors/tensor_<n>.pt.
"""

import re
from itertools import product
from pathlib import Path

import torch

from model.weights.hub import in_one_line

MAPPED_BYTES = 256 * 2**20
RANK = re.compile(r"(?:dp_rank_00_)?(ep_rank_\d+_)?tp_rank_(\d+)_pp_rank_(\d+)(?:\.pt)?")


class TensorReference:
    """Stands in for torch_xla's class of that name, which holds only `tid`, the number of a tensor's file."""


def load(path: Path):
    """The contents of `path`, with its tensors mapped, not read.

    Only tensors, plain containers and TensorReferences are loaded; raises ValueError for anything else.
    """
    try:
        with torch.serialization.safe_globals(
            [(TensorReference, "torch_xla.utils.serialization.TensorReference")]
        ):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load's errors for damaged files share no base class
        # Before this marker, torch advises to load the file with less care.
        reason = str(error).split("WeightsUnpickler error:")[-1]
        named = re.search(r"GLOBAL (\S+)", reason)
        problem = (
            f"it holds {named[1]}; tensors and plain containers are loaded" if named else in_one_line(reason)
        )
        raise ValueError(f"{path} cannot be read: {problem}") from None


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of the same shape are equal to the bit: NaNs are equal, 0 and -0 are not."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


class MappedFiles:
    """Keeps files mapped for many reads, until MAPPED_BYTES of them were read: mapped pages take memory."""

    def __init__(self):
        self._states, self._bytes = {}, 0

    def state(self, file: "RankFile") -> dict:
        return self._states.get(file.path) or self._states.setdefault(file.path, file.state())

    def count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > MAPPED_BYTES:
            self._states, self._bytes = {}, 0


class RankFile:
    """The part of the model that one tensor and pipeline parallel rank holds.

    `tensors` has the (shape, dtype) of each, by neuronx-distributed's name. Raises ValueError for a file that
    holds anything but named tensors of floating point numbers.
    """

    def __init__(self, path: Path, mapped: MappedFiles):
        self.path, self.tensors, self._references, self._mapped = path, {}, {}, mapped
        for key, value in self.state().items():
            if "lora" in str(key) or ".base_layer." in str(key):
                raise ValueError(
                    f"{path} holds {key}: neuronx-distributed's LoRA is not read, only models without "
                    "adapters"
                )
            if isinstance(value, TensorReference):
                if not isinstance(getattr(value, "tid", None), int):
                    raise ValueError(f"{path} is damaged: the reference to the tensor {key} has no number")
                self._references[key] = Path(f"{path}.tensors") / f"tensor_{value.tid}.pt"
                value = load(self._references[key])
            if (
                not isinstance(key, str)
                or not isinstance(value, torch.Tensor)
                or not value.is_floating_point()
            ):
                raise ValueError(f"{path}: {key} is no tensor of floating point numbers with a name")
            self.tensors[key] = (tuple(value.shape), value.dtype)

    def state(self) -> dict:
        """{name: tensor}: the whole file, or what it holds under a name for the model's part."""
        held = load(self.path)
        for key in ("model", "state_dict"):
            if isinstance(held, dict) and isinstance(held.get(key), dict):
                held = held[key]
        if not isinstance(held, dict):
            raise ValueError(f"{self.path} holds no names and tensors, but a {type(held).__name__}")
        return held

    def read(self, key: str, rows: slice) -> torch.Tensor:
        """These rows of a tensor, contiguous and in memory."""
        stored = load(self._references[key]) if key in self._references else self._mapped.state(self)[key]
        band = stored[rows].clone(memory_format=torch.contiguous_format)
        self._mapped.count(band.nbytes)
        return band


def find_ranks(directory: Path) -> list[list[RankFile]]:
    """The files of all ranks, [pipeline stage][tensor parallel rank]; raises ValueError if one is missing."""
    folder = directory / "model" if (directory / "model").is_dir() else directory
    paths = find_paths(folder)
    stages, tp = (max(numbers) + 1 for numbers in zip(*paths, strict=True))
    mapped, files = MappedFiles(), [[] for _ in range(stages)]
    for stage, rank in product(range(stages), range(tp)):
        if (stage, rank) not in paths:
            name = re.sub(
                r"tp_rank.*\d", f"tp_rank_{rank:02d}_pp_rank_{stage:02d}", next(iter(paths.values())).name
            )
            raise ValueError(
                f"{folder / name} is missing: there are {tp} tensor parallel ranks and {stages} pipeline "
                "stages"
            )
        path = paths[stage, rank]
        files[stage].append(RankFile(path / "checkpoint.pt" if path.is_dir() else path, mapped))
    return files


def find_paths(folder: Path) -> dict[tuple[int, int], Path]:
    """{(pipeline stage, tensor parallel rank): path} of the ranks' files, or directories, in `folder`.

    Raises ValueError where there is none, and for a checkpoint that was not completed.
    """
    tag = folder.parent if folder.name == "model" else folder
    if (tag / "checkpoint").is_file() and not (tag / "done").is_file():
        raise ValueError(f"{tag} is incomplete: neuronx-distributed has not written its file `done`")
    paths = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (match := RANK.fullmatch(path.name)):
            continue
        if match[1]:
            raise ValueError(f"{path} is an expert parallel rank's: a Llama has no experts")
        rank = int(match[3]), int(match[2])
        if rank in paths:
            raise ValueError(
                f"{path} and {paths[rank].name} are both of tensor parallel rank {rank[1]}, stage {rank[0]}"
            )
        paths[rank] = path
    if not paths:
        raise ValueError(f"{folder} holds no file dp_rank_00_tp_rank_.._pp_rank_...pt")
    return paths


def check_alike(files: list[RankFile]) -> None:
    """Raise ValueError unless the tensor parallel ranks of a stage hold the same names, shapes and dtypes."""
    for file in files[1:]:
        for key in {**files[0].tensors, **file.tensors}:
            here, there = (each.tensors.get(key, "missing") for each in (file, files[0]))
            if here != there:
                raise ValueError(f"{file.path}: {key} is {here}; in {files[0].path.name} it is {there}")
