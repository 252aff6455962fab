"""Reading a checkpoint directory: its manifest, checks that it is whole, and any slice on any topology.

docs/checkpoint-format.md describes the directory; trainer/checkpoint/writer.py writes it.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from data.loader import Position
from model.lora import LoraConfig
from model.weights.hub import read_json
from model.weights.safetensors_file import checksum
from parallel.buckets import Buckets
from parallel.shard import Shard
from trainer.checkpoint.manifest_checks import check_manifest
from trainer.checkpoint.names import FORMAT, INCOMPLETE, KINDS, MANIFEST, READABLE, manifest_checksum
from trainer.checkpoint.part import Part, read_part
from trainer.checkpoint.pieces import RANK_FILE, RankFiles, check_found, check_size
from trainer.checkpoint.stored import Stored


class Checkpoint:
    """A complete checkpoint, opened for reading: its manifest at once, tensors on demand.

    `tensors` has each stored tensor by its key `<kind>/<name>`, `shapes` the global shape of each parameter
    by its name. Raises ValueError where `path` is no checkpoint, or one of its files is missing, truncated or
    unreadable. Damage within the tensors is found by `verify`, by `stream` and by `load`.

    Where several processes read it together, each is (reader, number of them): the first looks at all files'
    sizes and reads those that no rank wrote, and each reads the headers of its part of the others.
    """

    def __init__(self, path: Path, reader: int = 0, readers: int = 1):
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.step: int = self.manifest["step"]
        self.position = Position(self.step, **self.manifest["position"])
        lora = self.manifest["identity"]["lora"]
        self.lora = LoraConfig(**lora | {"target_modules": tuple(lora["target_modules"])}) if lora else None
        self._files, self._part = RankFiles(self.path, self.manifest), None
        self.tensors = {
            key: Stored(self._files, key, values) for key, values in self.manifest["tensors"].items()
        }
        if reader == 0:
            _check_files(self.path, self.manifest["files"])
        ranks = [int(match[1]) for name in self.manifest["files"] if (match := RANK_FILE.fullmatch(name))]
        for rank in ranks[reader::readers]:
            self._files.open(rank)
        if readers == 1:
            for stored in self.tensors.values():
                stored.check()
        self.shapes = {
            key.removeprefix("parameter/"): stored.shape
            for key, stored in self.tensors.items()
            if key.startswith("parameter/")
        }

    def read(self, kind: str, name: str, shard: Shard | None = None) -> torch.Tensor:
        """The slice `shard` (default: all) of a parameter or a moment, fp32; `kind` is one of KINDS.

        Only the bytes of the slice are read. They are not verified.
        """
        stored = self.tensors[f"{kind}/{name}"]
        return stored.read(shard.slices if shard else tuple(slice(0, size) for size in stored.shape))

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """A parameter in consecutive bands of rows, fp32.

        Raises ValueError after the last band where the bytes are not those that were saved, or the values are
        not finite.
        """
        return self.tensors[f"parameter/{name}"].stream()

    def close(self) -> None:
        """Close the files that are open."""
        self._files.close()

    def verify(self, kinds: tuple[str, ...] = KINDS) -> None:
        """Read all tensors of these kinds; raises ValueError that names the first one with a wrong checksum,
        or with values that are not finite."""
        stored = [each for key, each in self.tensors.items() if key.split("/")[0] in kinds]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for problem in pool.map(Stored.problem, stored):
                if problem:
                    raise ValueError(problem)

    def check(self, identity: dict) -> None:
        """Raise ValueError unless the checkpoint belongs to the run that `identity` describes."""
        for key, here in json.loads(json.dumps(identity)).items():
            there = self.manifest["identity"].get(key)
            if there != here:
                raise ValueError(
                    f"{self.path} is of another run: its {key} is {there}, and that of these flags is {here}"
                )

    def check_tensors(self, expected: dict[str, tuple[int, ...]], kinds: tuple[str, ...] = KINDS) -> None:
        """Raise ValueError unless the files hold exactly the `expected` parameters, in each of `kinds`.

        `expected` maps names to global shapes.
        """
        found = {key: stored.shape for key, stored in self.tensors.items() if key.split("/")[0] in kinds}
        wanted = {f"{kind}/{name}": shape for kind in kinds for name, shape in expected.items()}
        odd = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
        if odd:
            raise ValueError(
                f"{self.path} is of another model: {odd[0]} has shape {found.get(odd[0], 'none')}, and "
                f"{wanted.get(odd[0], 'none')} was expected"
            )

    def load(self, buckets: Buckets) -> None:
        """Read what `part` will return; raises ValueError where it is damaged, or not finite.

        Does nothing where this is a checkpoint of another model, which check_tensors says.
        """
        shapes = {name: shard.global_shape for name, shard in buckets.shards.items() if not shard.padding}
        if all(self.shapes.get(name) == shape for name, shape in shapes.items()):
            self._part = read_part(self.tensors, buckets)

    def part(self, buckets: Buckets) -> Part:
        """What this rank has to read of the state (trainer/checkpoint/part.py), which `load` has read or is
        read now. It is let go of: it is given once."""
        part, self._part = self._part, None
        return part if part and part.is_of(buckets) else read_part(self.tensors, buckets)


def _read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint; raises ValueError where it is missing, damaged or of another version."""
    file = path / MANIFEST
    if not os.path.isfile(file) or path.name.endswith(INCOMPLETE):
        raise ValueError(
            f"{path} is no complete checkpoint: a directory checkpoint-<step> with a {MANIFEST} was expected"
        )
    manifest = read_json(file)
    if manifest.get("format") != FORMAT or manifest.get("version") not in READABLE:
        raise ValueError(
            f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}; "
            f"this program reads {FORMAT!r} version {' or '.join(map(str, READABLE))}"
        )
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise ValueError(f"{file} is damaged: its checksum is not that of its contents")
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise ValueError(f"{file} is damaged, or was changed: {error}") from None
    return manifest


def _check_files(path: Path, listed: dict[str, dict]) -> None:
    """Raise ValueError where one of the `listed` files is missing or has another size, or where one that no
    rank wrote is damaged: those are read as a whole."""
    for name, values in listed.items():
        check_size(path / name, values["bytes"])
        if not RANK_FILE.fullmatch(name):
            check_found(path / name, checksum((path / name).read_bytes()), values)
