// The tile unit's registers.
// For files compiled once for each instruction set, as simd.h.
#pragma once

#include "cpu/simd.h"

namespace fastdllm::cpu::FASTDLLM_ISA {
namespace {
namespace amx {

constexpr int kTile = 16; // rows of every tile; a row is 64 bytes

struct TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// The intrinsics do not tell the compiler which memory they read.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Owns the thread's tiles: eight of 16 rows of 64 bytes.
struct Tiles {
  Tiles() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTile;
    }
    memory_barrier();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

} // namespace amx
} // namespace
} // namespace fastdllm::cpu::FASTDLLM_ISA
