"""Imports what is slow to import, for the server from which tests fork their processes.

Nothing is computed here: a fork keeps no thread but its own.
"""

import gc

import torch_xla  # noqa: F401
from transformers import PreTrainedTokenizerFast  # noqa: F401

import trainer.job  # noqa: F401
import trainer.loop  # noqa: F401

gc.freeze()
