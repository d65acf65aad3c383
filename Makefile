# make demo   the whole chain on generated scenes: teachers, distillation, ONNX, benchmark, report
# make test   the tests
# make lint   ruff and strict mypy
#
# Each builds .venv first, as needed. Settings, as in `make demo PYTHON=python3.12`:
#   PYTHON       the interpreter to build .venv with, 3.10 to 3.13
#   TORCH_INDEX  another index to look for torch in. On Linux x86-64 the default index has CUDA builds of some GB;
#                TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small CPU build instead
#   WORKERS      processes to test with

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WORKERS ?= 2
DEMO ?= runs/demo

# Where a shell has Python keep no bytecode, each process of the tests and of the demonstration, of which there are hundreds,
# would compile all of torch and the rest that it imports anew: twice what importing takes otherwise.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test lint env constraints clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

env: $(INSTALLED)

# --no-compile: of torch's and others' thousands of files Python compiles those that it imports, when it does.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "edgekd needs Python 3.10 to 3.13: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "python venv is missing: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile $(INDEX) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/edgekd data make --out $(DEMO)-data --train 600 --val 250 --seed 0
	$(BIN)/edgekd run recipes/demo.yaml --out $(DEMO) --set data.root=$(DEMO)-data

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Needs uv. Pins torch to the version that the figures in the README were made with.
constraints:
	sed -n '/^#/p' constraints.txt > constraints.new
	echo 'torch==2.13.0' | uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 -c - \
		--no-annotate --no-header | grep -v -E '^(nvidia-|cuda-|triton|colorama|pyreadline3)' >> constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
