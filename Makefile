# Every target works on a bare machine with Python ≥ 3.10, make and a C++ compiler: it makes .venv and installs first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What the other stacks run: all but the runs of trainers, whose libraries they do not install.
STACK_TESTS := tests/fastpref tests/kernels tests/triton

.PHONY: demo test test-oldest test-gpu-stack lint format docs docs-serve bench report roofline wheel clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m examples.demo $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder $(ARGS)

test-oldest: .venv-oldest/test.stamp
	.venv-oldest/bin/python -m pytest -n auto $(STACK_TESTS) $(ARGS)

test-gpu-stack: .venv-gpu/test.stamp
	.venv-gpu/bin/python -m pytest -n auto $(STACK_TESTS) $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/typos

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/docs.stamp
	$(BIN)/mkdocs serve $(ARGS)

bench: $(VENV)/bench.stamp
	$(BIN)/fastpref bench $(ARGS)

report: $(VENV)/bench.stamp
	$(BIN)/fastpref bench --report

roofline: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/static_roofline.py $(ARGS)

wheel: $(VENV)/dev.stamp
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) .venv-oldest .venv-gpu build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing fastpref[$*] into $(VENV) (once; minutes on a first run)"
	$(PIP) --editable '.[$*]'
	@touch $@

.venv-%/test.stamp: pyproject.toml constraints-%.txt
	@echo "installing fastpref[test] into .venv-$* (once; gigabytes on a first run)"
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt --editable '.[test]'
	@touch $@
