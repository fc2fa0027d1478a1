# Finds every outside dependency of the build. README.md beside this file says what each is for.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

# pybind11: from the build environment (pip's isolated one, or the developer's).
if(NOT pybind11_DIR)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 2.13 CONFIG REQUIRED)

# torch: its own CMake package drags in the whole CUDA toolkit, so a few lines take its place.
# Only the stable ABI is used: one build serves the target version and every later one.
set(FASTDLLM_TORCH_TARGET "2.11" CACHE STRING "Oldest torch that the module must load in")
if(NOT FASTDLLM_TORCH_DIR)
  execute_process(COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
    OUTPUT_VARIABLE FASTDLLM_TORCH_DIR COMMAND_ERROR_IS_FATAL ANY)
endif()
file(READ "${FASTDLLM_TORCH_DIR}/version.py" _version_py)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${_version_py}")
set(FASTDLLM_TORCH_VERSION "${CMAKE_MATCH_1}")
message(STATUS "torch ${FASTDLLM_TORCH_VERSION} at ${FASTDLLM_TORCH_DIR}")

string(REPLACE "." ";" _target "${FASTDLLM_TORCH_TARGET}")
list(GET _target 0 _major)
list(GET _target 1 _minor)
math(EXPR _target "(${_major} << 56) | (${_minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${FASTDLLM_TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${_target}ULL)
if(APPLE)
  target_link_options(torch_stable INTERFACE -undefined dynamic_lookup)
else()
  foreach(_name torch torch_cpu c10)
    target_link_libraries(torch_stable INTERFACE
      "${FASTDLLM_TORCH_DIR}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}${_name}${CMAKE_SHARED_LIBRARY_SUFFIX}")
  endforeach()
endif()

# CUDA: AUTO builds the kernels where a compiler is found.
set(FASTDLLM_CUDA "AUTO" CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set_property(CACHE FASTDLLM_CUDA PROPERTY STRINGS AUTO ON OFF)
set(FASTDLLM_WITH_CUDA ${FASTDLLM_CUDA})
if(FASTDLLM_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  set(FASTDLLM_WITH_CUDA OFF)
  if(CMAKE_CUDA_COMPILER)
    set(FASTDLLM_WITH_CUDA ON)
  endif()
elseif(NOT FASTDLLM_CUDA MATCHES "^(ON|OFF)$")
  message(FATAL_ERROR "FASTDLLM_CUDA=${FASTDLLM_CUDA}: takes AUTO, ON or OFF")
endif()
if(FASTDLLM_WITH_CUDA)
  set(CMAKE_CUDA_ARCHITECTURES 80) # for the compiler's own check
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
    set(_problem "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old for the CUDA kernels, which take 12.4 or later")
    if(NOT FASTDLLM_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "${_problem}")
    endif()
    message(WARNING "${_problem}: building for the CPU only")
    set(FASTDLLM_WITH_CUDA OFF)
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "${FASTDLLM_CUDA_ARCHS}")
  if(CMAKE_CUDA_ARCHITECTURES STREQUAL "")
    set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      list(APPEND CMAKE_CUDA_ARCHITECTURES 90-virtual)
    else()
      list(APPEND CMAKE_CUDA_ARCHITECTURES 100-real 120)
    endif()
  endif()
endif()

# Google Benchmark, and OpenMP for its threads: only for benchmarks/cpp.
if(FASTDLLM_BENCHMARKS)
  find_package(benchmark QUIET)
  if(NOT benchmark_FOUND)
    message(FATAL_ERROR "FASTDLLM_BENCHMARKS needs Google Benchmark: on Debian and Ubuntu, "
      "`apt-get install libbenchmark-dev`; elsewhere https://github.com/google/benchmark, "
      "and -Dbenchmark_DIR=<where benchmarkConfig.cmake lies>")
  endif()
  find_package(OpenMP)
endif()
