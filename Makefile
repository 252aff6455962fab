# make train: fine-tune the embedded tiny Llama on 4 ranks (TP2 x DP2), merge it, ask it a question.
# make check: ruff, and the tests that start no process: a minute.   make test: ruff and all tests.
# make demo: train it until it knows the embedded sample, ask it before and after merging, and write a page of all its answers.
# PYTHON=python3.12 picks the interpreter of .venv. Where PYTHON itself has torch 2.9 and torch_xla 2.9 (an activated environment of
# a Neuron machine, say), that one is used, and only what it lacks is installed.
PYTHON ?= python3
OUT ?= output
USABLE := $(shell $(PYTHON) -c 'import sys; from importlib.metadata import version as v; \
	assert all(v(p).startswith("2.9.") for p in ("torch", "torch-xla")); print(sys.prefix, sys.executable)' 2>/dev/null)
VENV := $(or $(word 1,$(USABLE)),.venv)
PY := $(or $(word 2,$(USABLE)),.venv/bin/python)
READY := $(VENV)/.markstep-ready

.PHONY: train demo lint check test seconds golden flags clean
train: $(READY)
	@if [ -e $(OUT) ]; then echo "error: $(OUT) exists: move it away, or choose another: make train OUT=..." >&2; exit 1; fi
	$(PY) -m torch.distributed.run --standalone --nproc_per_node=4 trainer/main.py --tensor_parallel_size 2 \
	  --max_seq_length 256 --max_steps 150 --do_eval --learning_rate 1e-2 --lr_scheduler_type cosine --warmup_ratio 0.05 --output_dir $(OUT)
	$(PY) -m tools.merge_checkpoint $(OUT)/checkpoint-150 $(OUT)/merged
	$(PY) -m tools.generate --model $(OUT)/merged --instruction "What is the capital of France?" --max_new_tokens 40

demo: OUT = demo
demo: $(READY)
	@if [ -e $(OUT) ]; then echo "error: $(OUT) exists: move it away, or choose another: make demo OUT=..." >&2; exit 1; fi
	$(PY) -m torch.distributed.run --standalone --nproc_per_node=4 trainer/main.py --tensor_parallel_size 2 --max_seq_length 256 \
	  --per_device_train_batch_size 2 --max_steps 700 --learning_rate 1e-2 --lr_scheduler_type cosine --warmup_ratio 0.05 \
	  --output_dir $(OUT)
	$(PY) -m tools.generate --checkpoint $(OUT)/checkpoint-700 --tensor_parallel_size 2 --prompts data/sample/questions.jsonl
	$(PY) -m tools.merge_checkpoint $(OUT)/checkpoint-700 $(OUT)/merged
	$(PY) -m tools.generate --model $(OUT)/merged --prompts data/sample/questions.jsonl
	$(PY) -m tools.evaluate --base --checkpoint $(OUT)/checkpoint-700 --model $(OUT)/merged --max_seq_length 256 --batch_size 16 \
	  --output $(OUT)/evaluation

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

check: lint
	$(PY) -m pytest -q -m "not process"

test: lint
	$(PY) -m pytest -q

# Writes down how long the tests take, so that the longest are started first.
seconds: $(READY)
	$(PY) -m pytest -q --durations=0 --durations-min=1 >$(VENV)/tests.log || { cat $(VENV)/tests.log; exit 1; }
	grep -E '^ *[0-9.]+s (setup|call)' $(VENV)/tests.log >tests/seconds.txt

# Writes down what the golden runs compute (tests/trainer/test_golden.py): after a change that is meant to change it.
golden: $(READY)
	$(PY) -c "import tests.conftest; from tests.trainer.test_golden import write; write()"

# Writes docs/flags.md: after a change of the flags in trainer/config.py.
flags: $(READY)
	$(PY) -m tests.docs.flags_page

# A venv starts with the pip of its Python, and an old one takes minutes to choose versions.
.venv/bin/python:
	$(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet --upgrade pip || { rm -rf .venv; exit 1; }

$(READY): setup.cfg pyproject.toml | $(PY)
	$(PY) -m pip install --disable-pip-version-check --quiet --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
