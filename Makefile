# Everything needs only Python >= 3.11 and make: the virtual environment is made from the pinned lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRITON36 := .triton36
OUT ?= demo-out

.PHONY: demo check test test-all lint docs docs-pages bench clean

$(STAMP): requirements.lock pyproject.toml zoo/pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11') if sys.version_info < (3, 11) else None"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . -e ./zoo
	touch $@

# A second Triton, beside the pinned one, for the ahead-of-time compile tests (torch 2.11 pins 3.6.0).
$(TRITON36)/triton: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(TRITON36) triton==3.6.0
	touch $@

demo: $(STAMP)
	$(BIN)/hf-accel demo --out $(OUT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, into site/. A broken link, a page outside of the navigation or a docstring that does not fit is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# While writing a method: its own tests, and what it promises on one model of each kind.
M_TESTS = $(wildcard tests/patches/test_$(subst -,_,$(M)).py tests/patches/test_$(subst -,_,$(M))_*.py)
check: $(STAMP)
	$(if $(M),,$(error Which method? For example: make check M=svg2))
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 tests/matrix/test_promises.py $(M_TESTS) --cells representative --method $(M)

# Everything but the cells of the matrix that neither stand for a kind of model nor are touched by what changed.
test: $(STAMP) $(TRITON36)/triton lint docs
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cells changed

# Every cell of the matrix. Goes on where it stopped; outcomes are in tests/results/ and, from there, in the docs.
test-all: $(STAMP) $(TRITON36)/triton
	$(BIN)/python -m pytest -n 2 tests/matrix tests/kernels/test_aot.py --cells all --record; outcome=$$?; \
	$(MAKE) docs-pages && exit $$outcome

# The pages that are made from results and from what methods declare.
docs-pages: $(STAMP)
	$(BIN)/python docs/make/tables.py
	$(BIN)/python docs/make/compatibility.py > docs/.made && mv docs/.made docs/compatibility.md
	$(BIN)/python docs/make/matrix.py > docs/.made && mv docs/.made docs/matrix.md

bench: $(STAMP)
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) $(TRITON36) .triton_cache $(OUT) site .pytest_cache .mypy_cache .ruff_cache
