# make demo    train a small model on the King James Bible and let it write (minutes on 2 cores)
# make test    run the tests
# make check   lint and types; edits nothing          make fix    format and repair what can be
# make bench   the benchmark scripts                   make install    the environment of them all
# make sanitize  the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make native  rebuild the native extension in place, after a change to a .cpp or .hpp file

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := $(VENV)/.packages
EXTENSION := $(VENV)/.extension
BENCH_INSTALLED := $(VENV)/.installed-bench
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO_OUT ?= runs/demo
TEXT ?=
PROMPT ?= And it came to pass
NATIVE_SOURCES := $(wildcard src/blackmamba/ops/*/*.cpp src/blackmamba/ops/*/*.hpp)
NATIVE_BUILD := build/native

.PHONY: install demo test check fix bench native sanitized sanitize clean

install: $(INSTALLED)

# In two parts, which `make -j 2 install` makes side by side: the packages, and the extension.
$(INSTALLED): $(PACKAGES) $(EXTENSION)
	touch $@

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# pip, for without a compiler it installs the package without the extension, where cmake would fail
$(EXTENSION): pyproject.toml CMakeLists.txt $(NATIVE_SOURCES) | $(VENV)/.made
	$(PIP_INSTALL) --no-deps -e .
	touch $@

# pip would compile all modules to bytecode on one core, and those that nobody imports. A few that are
# for other versions cannot be.
$(PACKAGES): pyproject.toml constraints.txt | $(VENV)/.made
	$(BIN)/python -c "$$REQUIREMENTS" > $(VENV)/requirements.txt
	$(PIP_INSTALL) --no-compile -c constraints.txt -r $(VENV)/requirements.txt
	$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib > /dev/null || true
	touch $@

# What the package's extra "dev" needs, without the package
define REQUIREMENTS
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
left = [*project["dependencies"], "blackmamba[dev]"]
for requirement in left:
    if requirement.startswith("blackmamba["):
        for extra in requirement[11:-1].split(","):
            left += project["optional-dependencies"][extra]
    else:
        print(requirement)
endef
export REQUIREMENTS

$(BENCH_INSTALLED): $(INSTALLED)
	$(PIP_INSTALL) -c constraints.txt -e '.[bench]'
	touch $@

# A short spin lets two threads share busy cores: 10000 is no faster alone, and a seventh or more slower
# beside another process.
demo test sanitize: export GOMP_SPINCOUNT ?= 1000
demo: $(INSTALLED)
	$(BIN)/blackmamba train demo --out $(DEMO_OUT) $(if $(wildcard $(DEMO_OUT)/recipe.yaml),--resume) $(if $(TEXT),--text $(TEXT))
	$(BIN)/blackmamba generate $(DEMO_OUT) --prompt "$(PROMPT)" --max-new-tokens 150
	@printf '%s\n' '' 'To go on:' \
	  '  let it write again     $(BIN)/blackmamba generate $(DEMO_OUT) --prompt "In the beginning" --seed 1' \
	  '  its layers and sizes   $(BIN)/blackmamba info $(DEMO_OUT)' \
	  '  in 4 bits a weight     $(BIN)/blackmamba quantize $(DEMO_OUT) --bits 4 --out $(DEMO_OUT)-int4' \
	  '  how its run went       $(DEMO_OUT)/loss.png, $(DEMO_OUT)/expert-load.png' \
	  '  a model of your own    docs/training.md'

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=90

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH_INSTALLED)
	for script in benchmarks/cpu_*.py; do $(BIN)/python $$script || exit 1; done

# Quicker than to install again: the new extension takes the place of the installed one, which processes
# that run keep
native: $(PACKAGES) $(if $(wildcard $(EXTENSION)),,$(EXTENSION))
	$(BIN)/cmake -S . -B $(NATIVE_BUILD) -DPython_EXECUTABLE=$(abspath $(BIN)/python) > /dev/null
	$(BIN)/cmake --build $(NATIVE_BUILD)
	to="$$($(BIN)/python -c 'from blackmamba import _native; print(_native.__file__)')" && \
	  cp $(NATIVE_BUILD)/_native.*.so "$$to.new" && mv "$$to.new" "$$to"
	touch $(EXTENSION) $(INSTALLED)

# A copy of the package with a sanitized extension, and its tests. Memory that Python and torch keep
# until the end counts as leaked, so leaks are not looked for.
SANITIZED := build/sanitized
SANITIZE_TESTS ?= $(wildcard tests/ops/test_native*.py) tests/generate/test_decoder.py
sanitized: $(INSTALLED)
	$(BIN)/cmake -S . -B $(SANITIZED) -DBLACKMAMBA_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) > /dev/null
	$(BIN)/cmake --build $(SANITIZED) -j 2
	rm -rf $(SANITIZED)/package && mkdir $(SANITIZED)/package
	cp -r src/blackmamba $(SANITIZED)/package/ && rm -f $(SANITIZED)/package/blackmamba/*.so
	cp $(SANITIZED)/_native.*.so $(SANITIZED)/package/blackmamba/
	cp tests/sanitized/sitecustomize.py $(SANITIZED)/package/

sanitize: sanitized
	PYTHONPATH=$(SANITIZED)/package OMP_NUM_THREADS=2 HYPOTHESIS_PROFILE=small \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -p no:cacheprovider $(SANITIZE_TESTS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .coverage*
