"""Packages that only some tools need, and the pip extra that installs each."""

import importlib.util

EXTRAS = {"matplotlib": "plots", "rouge_score": "evaluation"}


def require(module: str) -> None:
    """Raise ValueError, naming the pip extra, where a module of EXTRAS is not installed."""
    if importlib.util.find_spec(module) is None:
        command = f'pip install -e ".[{EXTRAS[module]}]"'
        raise ValueError(
            f"{module.replace('_', '-')} is not installed: `{command}` in the repository's directory"
        )
