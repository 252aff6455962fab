"""What all tests run under."""
import os

# Four fifths of a small run would be LLVM optimising the CPU code of its graph. The graph is the same without.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Said before torch_xla is imported, or it warns that it has to guess.
os.environ.setdefault("PJRT_DEVICE", "CPU")
