#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU in one go, within nine minutes:
#
#   benchmarks/run_gpu.sh DIR
#
# Parts run in order of worth, each within its own time; one that fails does not stop the rest, unless it is the
# build. The exit status says whether anything failed. At most eight files come out in DIR; log.txt has it all.
# All files of results lie in results.tar, which is written anew after every part that makes one:
#
#   tar -xf DIR/results.tar -C benchmarks/results && make bench-page
#
# Needs python3 (or $PYTHON) with a CUDA build of torch >= 2.11, transformers, pytest, scikit-build-core and
# pybind11; cmake >= 3.25, ninja, nvcc >= 12.4 and a C++20 compiler. No network. Used where they are there:
# Google Benchmark (CMAKE_PREFIX_PATH may name its place), compute-sanitizer, cuobjdump, nvdisasm. Where there
# is no git, $FASTDLLM_COMMIT names the commit for the results.
set -uo pipefail
out=$(mkdir -p "${1:?"usage: $0 DIR"}" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
exec > >(tee "$out/log.txt") 2>&1
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

status=0
summary=()
# part NAME SECONDS COMMAND...
part() {
  local name=$1 seconds=$2 begin=$SECONDS code
  shift 2
  echo "=== $name: at most $seconds s"
  timeout --kill-after=3 "$seconds" "$@"
  code=$?
  # A sanitizer whose time is up has found nothing so far.
  [[ $code -eq 0 || ($code -eq 124 && $name == *check) ]] || status=1
  summary+=("$(printf '%-12s exit %3d %4d s' "$name" $code $((SECONDS - begin)))")
  return $code
}
# bench NAME SECONDS ARGUMENTS...: stops by itself before its time is up.
bench() {
  part "$1" "$2" "$python" "benchmarks/$1.py" --device cuda --out "$results/$1-cuda.json" "${@:3}"
  pack
}
pack() { tar -C "$results" -cf "$out/results.tar" .; }
pytest() { part "$1" "$2" "$python" -m pytest -p no:cacheprovider --junitxml "$out/$1.xml" "${@:3}"; }
finish() {
  echo "=== summary after $SECONDS s"
  printf '%s\n' "${summary[@]}"
  exit $status
}

nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.sm,clocks.mem --format=csv
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '.')
architecture=${capability/%90/90a}-real # Hopper's own instructions are in 90a

part build 130 "$python" -m pip install -q --no-build-isolation --no-deps -e . \
  -C cmake.define.FASTDLLM_CUDA=ON -C cmake.define.FASTDLLM_CUDA_ARCHS="$architecture" \
  -C cmake.define.FASTDLLM_SIMT=OFF -C cmake.define.FASTDLLM_PTX_PROBE=ON \
  -C cmake.define.FASTDLLM_BENCHMARKS=OFF || finish
"$python" -m fastdllm_ext env

pytest pytest-cuda 105 -m cuda
bench end_to_end 85 --repeats 3 --seconds-each 4 --seconds 55
bench phases 25 --repeats 2 --seconds 12
bench growth 40 --repeats 1 --seconds 25
bench precision 30 --repeats 2 --prompts 200 --seconds 18
bench ops 35 --seconds 25
bench memory 15 --contexts 2048 16384 --seconds 8

# In the install's own build folder, where all but the benchmark is built already.
# shellcheck disable=SC2317
bench_cpp() {
  local folder
  for folder in build/*-Release; do break; done
  cmake -DFASTDLLM_BENCHMARKS=ON "$folder" >"$out/cmake.txt" 2>&1 || {
    grep -A1 "needs Google Benchmark" "$out/cmake.txt" && return 0
    return 1
  }
  rm "$out/cmake.txt"
  cmake --build "$folder" --target fastdllm_bench &&
    "$folder/benchmarks/cpp/fastdllm_bench" --benchmark_filter='^cuda/' --benchmark_min_time=0.02 \
      --benchmark_out="$results/cpp-cuda.json" --benchmark_out_format=json
}
export -f bench_cpp
export out results
part bench-cpp 25 bash -c bench_cpp
pack

# Without torch's own memory pool, which hides accesses past the end.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
    "$python" -m pytest -p no:cacheprovider -x -m cuda "${@:3}"
}
if command -v compute-sanitizer >/dev/null; then
  sanitize memcheck 30 tests/test_copy_pages.py tests/test_unmask.py tests/test_paged_attention.py
  sanitize racecheck 15 tests/test_unmask.py tests/test_paged_attention.py
else
  echo "no compute-sanitizer: skipped"
fi

finish
