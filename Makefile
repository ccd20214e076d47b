# Each target sets up .venv by itself on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow test-gpu bench lint clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py --out demo.png

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -rs

# What this machine can run; the scripts that need a GPU say so and are passed over without one.
bench: $(READY)
	$(BIN)/python benchmarks/host_overhead.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/entropy_cost.py
	$(BIN)/python benchmarks/adapter.py
	$(BIN)/python benchmarks/compile_report.py
	$(BIN)/python benchmarks/throughput.py || test $$? -eq 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo.png

$(READY): pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@
