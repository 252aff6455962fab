"""Which files of a folder are its training split, by the names that the `datasets` library knows."""

import re
from pathlib import Path, PurePosixPath

# The names of splits in the paths of files, as in `datasets.data_files` (SPLIT_KEYWORDS, NON_WORDS_CHARS).
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATOR = r"[-._ 0-9]"
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*")  # as the hub's own tools name files
CARD = "README.md"
NAMED = 5  # files left out that are named


def training_files(folder: Path, files: list[Path]) -> tuple[list[Path], str]:
    """(those of `files` that are the training split, a line on what was left out, or "").

    They are the files that `datasets.load_dataset(folder, split="train")` would read: those that the card
    (README.md) lists; else data/train-00000-of-00002.*; else those in folders named train, or like it; else
    those that are named so. Where no name tells, all are. Capitals make no difference here. Raises ValueError
    where there are splits, and none of them is train.
    """
    names = {PurePosixPath(file.relative_to(folder).as_posix()): file for file in files}
    splits, source = _splits_of_card(folder, list(names)), f"its {CARD}"
    if splits is None:
        splits, source = _splits_of_names(list(names)), "their names"
    if not splits:
        return files, ""
    if not splits.get("train"):
        present = ", ".join(split for split, members in splits.items() if members)
        raise ValueError(
            f"--dataset {folder}: by {source}, its files are of the splits {present or '(none)'}; files of a "
            "split named train were expected: name the files or the folder to train on"
        )
    chosen = [names[name] for name in names if name in splits["train"]]
    left = [str(name) for name in names if name not in splits["train"]]
    if not left:
        return chosen, ""
    more = " ..." if len(left) > NAMED else ""
    return chosen, (
        f"{len(chosen)} of {len(files)} files are read, its split train by {source}; left out: "
        f"{', '.join(left[:NAMED])}{more}"
    )


def _splits_of_names(names: list[PurePosixPath]) -> dict[str, set[PurePosixPath]]:
    """{split: its files} by the first of the three ways of naming that any file follows; {} for none."""
    shards = {name: match[1] for name in names if (match := SHARD.fullmatch(str(name)))}
    if shards:
        return {split: {name for name in shards if shards[name] == split} for split in shards.values()}
    for in_folder, end in ((True, f"({SEPARATOR}.*)?"), (False, f"{SEPARATOR}.*")):
        found = {}
        for split, keywords in KEYWORDS.items():
            pattern = re.compile(f"(.*{SEPARATOR})?({'|'.join(keywords)}){end}", re.IGNORECASE)
            for name in names:
                if any(map(pattern.fullmatch, name.parent.parts if in_folder else [name.name])):
                    found.setdefault(split, set()).add(name)
        if found:
            return found
    return {}


def _splits_of_card(folder: Path, names: list[PurePosixPath]) -> dict[str, set[PurePosixPath]] | None:
    """{split: its files} of the default configuration in the card's front matter; None where it lists none.

    The format: https://huggingface.co/docs/hub/datasets-manual-configuration. Raises ValueError where several
    configurations are listed, and none is the default.
    """
    configurations = _configurations(folder / CARD)
    if not configurations:
        return None
    defaults = [each for each in configurations if each["config_name"] == "default" or each.get("default")]
    if len(configurations) > 1 and len(defaults) != 1:
        listed = ", ".join(str(each["config_name"]) for each in configurations)
        raise ValueError(
            f"--dataset {folder}: its {CARD} lists several configurations ({listed}): name the folder or the "
            "files of one of them"
        )
    chosen = (defaults or configurations)[0]
    inside = PurePosixPath(str(chosen.get("data_dir") or "."))
    within = {name.relative_to(inside): name for name in names if name.is_relative_to(inside)}
    if chosen.get("data_files") is None:
        found = _splits_of_names(list(within)) or {"train": set(within)}
    else:
        from datasets.data_files import sanitize_patterns
        from fsspec.utils import glob_translate

        found = {
            split: {name for name in within for each in patterns if re.match(glob_translate(each), str(name))}
            for split, patterns in sanitize_patterns(chosen["data_files"]).items()
        }
    return {split: {within[name] for name in members} for split, members in found.items()}


def _configurations(card: Path) -> list[dict]:
    """The configurations in a card's front matter (YAML); [] where there is no card, or none is listed."""
    if not card.is_file():
        return []
    from huggingface_hub import RepoCard

    try:
        listed = RepoCard.load(card, ignore_metadata_errors=True).data.to_dict().get("configs")
    except Exception:  # a card that cannot be read lists nothing; its errors share no base class
        return []
    if not isinstance(listed, list):
        return []
    return [each for each in listed if isinstance(each, dict) and "config_name" in each]
