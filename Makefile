# Each target creates the environment that it needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: test test-slow test-gpu test-emulated mutants test-oldest test-newest test-machines fuzz bench demo lint clean

# The tests that need no GPU, without the slow ones, in two processes: one takes twice as long.
test: $(READY)
	$(BIN)/python -m pytest -n 2

# The slow tests: the whole compile matrix, Inductor (which needs a C++ compiler), every way of installing.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# The tests on a CUDA or ROCm device.
test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -rs

# The same cases on an A100 in software (tests/emulator), and what only it can see. Needs a C compiler, and half an hour.
# Inductor asks for a real device.
test-emulated: $(READY)
	PYTHONPATH=tests $(BIN)/python -m pytest -p emulator.plugin -rs tests/emulated tests/test_gpu.py \
		--deselect tests/test_gpu.py::test_compiled_by_inductor

# Can those tests fail? Breaks the kernel and its launch in every way of tests/emulated/mutations.py, and writes what saw
# it to tests/emulated/mutants.md. Twenty minutes.
mutants: $(READY)
	PYTHONPATH=tests $(BIN)/python -m emulated.mutants

# The tests with the oldest supported dependencies, and with the newest. Each environment downloads several GB once.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n 2

test-newest: .venv-newest/.ready
	.venv-newest/bin/python -m pytest -n 2

# The tests under other instruction sets, numbers of threads and test orders.
test-machines: $(READY)
	$(BIN)/python tests/machines.py

# Random calls, valid and invalid, checked against attention in float64.
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py

# The benchmarks that this machine can run. throughput.py exits with status 2 where there is no GPU.
bench: $(READY)
	$(BIN)/python benchmarks/host_overhead.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/entropy_cost.py
	$(BIN)/python benchmarks/buckets.py
	$(BIN)/python benchmarks/adapter.py
	$(BIN)/python benchmarks/compile_report.py
	$(BIN)/python benchmarks/throughput.py || test $$? -eq 2

# Draws the README's picture to demo.png.
demo: $(READY)
	$(BIN)/python benchmarks/paper/demo.py --out demo.png

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo.png

.venv/.ready: constraints.txt
.venv-oldest/.ready: constraints-oldest.txt
.venv-newest/.ready: constraints-newest.txt
# -qq hides all output of pip but errors.
%/.ready: pyproject.toml setup.cfg
	@echo "Setting up $* with the versions of $(filter constraints%,$^)"
	@$(PYTHON) -m venv $*
	@$*/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]' -c $(filter constraints%,$^)
	@touch $@
