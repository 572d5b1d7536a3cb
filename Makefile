# Every target works on a bare machine with Python ≥ 3.10, make and a C++ compiler: it makes .venv and installs first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format docs docs-serve bench report roofline wheel clean

demo: $(VENV)/demo.stamp
	$(BIN)/fastpref demo $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

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
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing fastpref[$*] into $(VENV) (once; minutes on a first run)"
	$(PIP) --editable '.[$*]'
	@touch $@
