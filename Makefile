# make demo    train a small model on the King James Bible and let it write (minutes on 2 cores)
# make test    run the tests
# make check   lint and types; edits nothing          make fix    format and repair what can be
# make bench   the benchmark scripts                   make install    the environment of them all
# make native  rebuild the native extension in place, after a change to a .cpp or .hpp file

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= runs/demo
TEXT ?=
PROMPT ?= And it came to pass
NATIVE_SOURCES := $(wildcard src/blackmamba/ops/*/*.cpp src/blackmamba/ops/*/*.hpp)
NATIVE_BUILD := build/native

.PHONY: install demo test check fix bench native clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(NATIVE_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# A short spin lets two threads share busy cores: 1.6 times as fast beside one other process.
demo: export GOMP_SPINCOUNT ?= 1000
demo: $(INSTALLED)
	$(BIN)/blackmamba train demo --out $(DEMO_OUT) $(if $(wildcard $(DEMO_OUT)/recipe.yaml),--resume) $(if $(TEXT),--text $(TEXT))
	$(BIN)/blackmamba generate $(DEMO_OUT) --prompt "$(PROMPT)" --max-new-tokens 150

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=90

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	for script in benchmarks/cpu_*.py; do $(BIN)/python $$script || exit 1; done

# src/ comes before the installed extension on the path, so that this copy is the one that is used
native:
	cmake -S . -B $(NATIVE_BUILD) -DPython_EXECUTABLE=$(abspath $(BIN)/python) > /dev/null
	cmake --build $(NATIVE_BUILD)
	cp $(NATIVE_BUILD)/_native.*.so src/blackmamba/

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .coverage*
