"""What a process of a test has imported when it is forked: everything slow that is not ours. Nothing is
computed here, because a thread does not survive a fork."""

import gc

import torch  # noqa: F401
import torch_xla  # noqa: F401
import transformers  # noqa: F401

gc.freeze()
