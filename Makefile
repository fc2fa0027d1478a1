# Everything sets itself up: a virtual environment in .venv, the build, then the command.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# torch is capped so that pip takes a CPU build where one is at hand; any version from 2.11 on works.
TORCH  ?= torch>=2.11,<2.14
BUILD_TOOLS := scikit-build-core>=0.10 pybind11>=2.13 ninja cmake

SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc third_party -type f -not -name '*.pyc')

.PHONY: demo test lint format asan clean install help
help:
	@echo "make demo    build, then the bundled model: unpatched against patched, one table"
	@echo "make test    build, then the whole test-suite"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make asan    the operations' tests under AddressSanitizer and UBSan"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)" $(foreach tool,$(BUILD_TOOLS),"$(tool)")
	@touch $@

# Editable, so that Python changes need no new install; a change of the sources builds again.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/fastdllm-ext demo --out demo-out

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf build demo-out $(VENV)
