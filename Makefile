# Everything sets itself up: a virtual environment in .venv, the build, then the command.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# torch is capped so that pip takes a CPU build where one is at hand; any version from 2.11 on works.
TORCH  ?= torch>=2.11,<2.14
# Published modeling files are written for older versions of transformers than the newest, which `make test` takes.
TRANSFORMERS ?= 4.49.0
TORCHAO ?= 0.18.0
BUILD_TOOLS := scikit-build-core>=0.10 pybind11>=2.13 ninja cmake

SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc third_party tests/simt -type f -not -name '*.pyc')
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
# Runs Python on a copy of the package instead of the editable install (-S: no .pth files).
SITE = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
PYTHON_ON = PYTHONPATH=$(1):$(SITE) $(abspath $(BIN))/python -S
OTHER_TRANSFORMERS := $(VENV)/transformers-$(TRANSFORMERS)
TRANSFORMERS_TESTS := $(addprefix tests/test_,compat.py patching.py load.py models.py idioms.py)

# Where make bench writes; a checkout of NVlabs/Fast-dLLM to measure beside, which old transformers run.
BENCH_DIR ?= build/bench
BENCH_REFERENCE ?=

# Side by side; threads that wait sleep, or those of one would keep those of the other from running.
TEST_WORKERS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.PHONY: help install demo test test-slow test-transformers lint format wheel asan mutants bench bench-page bench-cpp quality clean
help:
	@echo "make demo    build, then the bundled model: unpatched against patched, one table"
	@echo "make test    build, then the whole test-suite; then test-transformers"
	@echo "make test-slow  the tests that take half a minute or more each: commands on Ray clusters, ..."
	@echo "make test-transformers  the models' tests with transformers $(TRANSFORMERS); TRANSFORMERS=... takes another"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make wheel   build as plain pip does, with build isolation, and try the result"
	@echo "make asan    the operations' tests, emulated CUDA included, under AddressSanitizer and UBSan"
	@echo "make mutants  does the suite notice every fault that is planted in a CUDA kernel? (several hours)"
	@echo "make bench   generations, phases, growth, memory, operations: under 20 minutes, and a page of them in"
	@echo "             $(BENCH_DIR); BENCH_REFERENCE=PATH measures beside a checkout of NVlabs/Fast-dLLM"
	@echo "make quality  what the speed costs the bundled model: report, calibration, docs/quality.md (an hour)"
	@echo "make bench-page  docs/performance.md from benchmarks/results"
	@echo "make bench-cpp  the kernels without torch (needs Google Benchmark); BENCH_FLAGS=--benchmark_..."

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)" $(foreach tool,$(BUILD_TOOLS),"$(tool)")
	@touch $@

# Editable, so that Python changes need no new install; a change of the sources builds again. With the
# emulated CUDA kernels, for the tests.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]" \
	  -C cmake.define.FASTDLLM_SIMT=ON -C cmake.define.FASTDLLM_PTX_PROBE=ON
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/fastdllm-ext demo --out demo-out $(DEMO_FLAGS)

test: install $(VENV)/torchao/.installed
	PYTHONPATH=$(abspath $(VENV)/torchao) $(PYTEST)
	$(MAKE) test-transformers

test-slow: install
	$(PYTEST) -m slow

# For the tests of quantised models alone: transformers loads torchao where it sees it, which is not quiet.
$(VENV)/torchao/.installed: | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) torchao==$(TORCHAO)
	@touch $@

# Beside the environment's own transformers, with all that it depends on, and found before them.
$(OTHER_TRANSFORMERS)/.installed: | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --target $(@D) transformers==$(TRANSFORMERS)
	@touch $@

test-transformers: install $(OTHER_TRANSFORMERS)/.installed $(VENV)/torchao/.installed
	FASTDLLM_EXPECT_TRANSFORMERS=$(TRANSFORMERS) \
	  PYTHONPATH=$(abspath $(OTHER_TRANSFORMERS)):$(abspath $(VENV)/torchao) \
	  $(PYTEST) $(TRANSFORMERS_TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: install
	rm -rf build/wheel
	$(BIN)/python -m pip wheel -q --no-deps $(WHEEL_FLAGS) --wheel-dir build/wheel .
	$(BIN)/python -m pip install -q --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel && $(call PYTHON_ON,site) -m fastdllm_ext env

asan: install
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset asan -DPython_EXECUTABLE="$(abspath $(BIN))/python"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset asan
	rm -rf build/asan/site && mkdir -p build/asan/site && cp -r python/fastdllm_ext build/asan/site
	cp build/asan/_C*.so build/asan/_simt.so build/asan/site/fastdllm_ext
	$(MAKE) -j2 --output-sync=target $(addprefix asan-tests-,$(ASAN_TESTS))

# Of the operations, in two runs that are about as long, side by side.
ASAN_TESTS := first second
ASAN_first := paged_attention rope_write_kv copy_pages elementwise quantize_fp8 linear linear_int8 cache block_loop
ASAN_second := unmask
asan-tests-%:
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 FASTDLLM_SIMT_SCHEDULES=7 OMP_NUM_THREADS=1 $(call PYTHON_ON,build/asan/site) \
	  -m pytest $(ASAN_$*:%=tests/test_%.py)

# Several hours. Removes every barrier and flips every bound of the CUDA kernels, one at a time.
mutants: install
	$(BIN)/python tests/simt/mutate.py --out docs/mutation.md $(MUTATE_FLAGS)

bench: install $(if $(BENCH_REFERENCE),$(OTHER_TRANSFORMERS)/.installed)
	$(if $(BENCH_REFERENCE),PYTHONPATH=$(abspath $(OTHER_TRANSFORMERS))) \
	  $(BIN)/python benchmarks/end_to_end.py --device cpu --seconds 480 --out $(BENCH_DIR)/end_to_end-cpu.json \
	  $(if $(BENCH_REFERENCE),--reference $(BENCH_REFERENCE))
	$(BIN)/python benchmarks/phases.py --device cpu --seconds 90 --out $(BENCH_DIR)/phases-cpu.json
	$(BIN)/python benchmarks/growth.py --device cpu --seconds 150 --out $(BENCH_DIR)/growth-cpu.json
	$(BIN)/python benchmarks/memory.py --device cpu --seconds 90 --out $(BENCH_DIR)/memory-cpu.json
	$(BIN)/python benchmarks/precision.py --device cpu --seconds 150 --out $(BENCH_DIR)/precision-cpu.json
	$(BIN)/python benchmarks/ops.py --device cpu --repeats 11 --out $(BENCH_DIR)/ops-cpu.json
	$(BIN)/python benchmarks/page.py --results $(BENCH_DIR) --out $(BENCH_DIR)/performance.md \
	  --images $(BENCH_DIR)/images

# On the bundled model; with other CPU load the times are worthless.
quality: install
	$(BIN)/fastdllm-ext calibrate demo --limit 1000 --seed 8 --out build/calibrated
	$(BIN)/fastdllm-ext report demo --limit 200 --more 1000 --seed 7 --config build/calibrated --out build/quality
	$(BIN)/python benchmarks/quality.py --report build/quality/report.json \
	  --calibration build/calibrated/calibration/calibration.json

bench-page: install
	$(BIN)/python benchmarks/page.py

# Bound threads that sleep while they wait: else two on one core can stall each other for milliseconds.
bench-cpp: $(VENV)/.torch
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset bench -DPython_EXECUTABLE="$(abspath $(BIN))/python"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset bench --target fastdllm_bench
	OMP_PROC_BIND=true OMP_WAIT_POLICY=passive build/bench/benchmarks/cpp/fastdllm_bench $(BENCH_FLAGS)

clean:
	rm -rf build demo-out $(VENV)
