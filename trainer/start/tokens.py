"""Tokens of a job of several processes: made once where they share a directory, else once a machine."""

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from data.token_cache import Maker, cache_directory, entry_of
from data.tokens import Tokens, tokenize
from parallel.runtime import Peers
from trainer.config import Config


def tokens_of(config: Config, tokenizer, peers: Peers) -> list[Tokens]:
    """The tokens of each data set.

    The first process of each machine finds, checks or makes them; the others map the files that it names.
    """
    found = []
    for number, name in enumerate(config.datasets):
        made = []

        def make(name=name, number=number, made=made) -> list[str]:
            made.append(_tokenize(config, tokenizer, name, OfSeveral(peers, number, name)))
            return [str(made[0].directory), made[0].note]

        directory, note = peers.first_on_node(f"tokens of {name} (data set {number + 1})", make)
        found.append(made[0] if made else replace(Tokens.open(Path(directory), checked=True), note=note))
    return found


def _tokenize(config: Config, tokenizer, name: str, maker: "OfSeveral") -> Tokens:
    with maker.at_work():
        tokens = tokenize(
            name,
            tokenizer,
            format_name=config.format,
            train_on_prompt=config.train_on_prompt,
            max_samples=config.max_samples,
            skip_bad=config.skip_bad,
            streaming=config.streaming,
            pairs=config.trains_on_pairs,
            cache=cache_directory(config.data_cache_dir),
            maker=maker,
        )
    maker.ends(tokens.directory)
    return tokens


class OfSeveral(Maker):
    """The first process of a machine, of several machines.

    Where the very first process makes the entry it tells the others in which directory. Those that see the
    directory wait, because the cache is shared; the others make their own at the same time.
    """

    def __init__(self, peers: Peers, number: int, name: str):
        self._peers, self._name = peers, name
        self._begun, self._ended = (f"{name} ({what}, data set {number + 1})" for what in ("begun", "made"))

    def at_work(self) -> AbstractContextManager:
        """A context within which others may read that this process tokenizes."""
        return self._peers.doing(f"tokenizes {self._name}")

    def begins(self, partial: Path) -> None:
        if self._peers.is_first:
            self._peers.share(self._begun, str(partial))

    def made_by_another(self) -> Path | None:
        if self._peers.is_first:
            return None
        begun = self._peers.share(self._begun, "")
        if not begun:
            return None  # it had one already
        return Path(self._peers.share(self._ended, "")) if self._sees(Path(begun)) else None

    def _sees(self, partial: Path) -> bool:
        """Whether this machine has the directory, or by now the entry, that the first process makes."""
        return partial.is_dir() or os.path.lexists(entry_of(partial))

    def ends(self, directory: Path) -> None:
        """The entry is in `directory`, found or made."""
        if self._peers.is_first:
            self._peers.share(self._begun, "")  # stands only where none was begun
            self._peers.share(self._ended, str(directory))
