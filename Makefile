# Each target sets up its environment by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: test test-slow test-gpu test-emulated test-oldest test-newest test-machines fuzz bench demo lint clean

# Everything that needs no GPU.
test: $(READY)
	$(BIN)/python -m pytest

# What takes minutes: the whole compile matrix, Inductor (which needs a C++ compiler), every way of installing.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The same cases on a CUDA or ROCm device.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -rs

# The same cases on an A100 in software (tests/emulator), and what only it can see. Needs a C compiler, and half an hour.
# Inductor asks for a real device.
test-emulated: $(READY)
	PYTHONPATH=tests $(BIN)/python -m pytest -p emulator.plugin -rs tests/emulated tests/test_gpu.py \
		--deselect tests/test_gpu.py::test_compiled_by_inductor

# The tests with the oldest versions that the README names, and with the newest. Each downloads several GB once.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest

test-newest: .venv-newest/.ready
	.venv-newest/bin/python -m pytest

# The tests under the arithmetic of other processors.
test-machines: $(READY)
	$(BIN)/python tests/machines.py

# Random calls, valid and not, against the definition in float64.
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py

# What this machine can run. The scripts that need a GPU say so and are passed over without one.
bench: $(READY)
	$(BIN)/python benchmarks/host_overhead.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/entropy_cost.py
	$(BIN)/python benchmarks/adapter.py
	$(BIN)/python benchmarks/compile_report.py
	$(BIN)/python benchmarks/throughput.py || test $$? -eq 2

# The picture of the README, in demo.png.
demo: $(READY)
	$(BIN)/python benchmarks/demo.py --out demo.png

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo.png

.venv/.ready: constraints.txt
.venv-oldest/.ready: constraints-oldest.txt
.venv-newest/.ready: constraints-newest.txt
# -qq leaves pip's errors and drops its notes.
%/.ready: pyproject.toml setup.cfg
	@echo "Setting up $* with the versions of $(filter constraints%,$^)"
	@$(PYTHON) -m venv $*
	@$*/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]' -c $(filter constraints%,$^)
	@touch $@
