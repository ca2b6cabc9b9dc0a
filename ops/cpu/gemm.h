// The CPU's kernels: grouped GEMM y = x W^T + bias on panels (ops/cpu/layout.h).
//
//   gemm_reference.<format>     portable C++; runs everywhere, oracle of the tests
//   gemm_avx2.<format>          AVX2, FMA, F16C
//   gemm_avx512.<format>        AVX-512 F, BW, VL, DQ
//   gemm_neon.<format>          AArch64, any
//
// These are exact, float32 inside. They take every registered format (2, 4 or 8 bits: codes are
// decoded by a table, or as signed integers where the format allows; plain floats), every
// activation type, per channel and any block size that is a multiple of 16.
//
//   gemm_avx512_bf16.<format>   accuracy_level 3 and 4: AVX512_BF16 (AMD's), activations and weights
//                               (before their scales) rounded to bfloat16, sums in float32
//   gemm_avx2_int8.<format>     accuracy_level 4: AVX2, activations rounded to int8
//   gemm_avxvnni.<format>       accuracy_level 4: AVX-VNNI, activations rounded to int8
//   gemm_avx512_vnni.<format>   accuracy_level 4: AVX512_VNNI, activations rounded to int8
//   gemm_amx.<format>           any level: AMX-BF16, activations cut into three bfloat16 parts
//   gemm_amx_bf16.<format>      accuracy_level 3 and 4: AMX-BF16, activations and weights (times
//                               their scales) rounded to bfloat16, sums in float32
//   gemm_neon_dotprod.<format>  accuracy_level 4: AArch64's SDOT, activations rounded to int8
//   gemm_neon_i8mm.<format>     accuracy_level 4: AArch64's SMMLA, activations rounded to int8
//
// These are there for the formats that they are faster with (AMX: whose values are bfloat16
// numbers); ops/cpu/gemm_blocks.inc says what they compute. AMX is for many rows: with fewer than
// FewestTileRows an expert, the best of the other kernels runs. Of the kernels that the node's
// accuracy_level and the processor allow, the one with the highest priority runs; environment
// variable QMOE_PLUGIN_CPU_ISA = reference | avx2 | avxvnni | avx512 | amx (on AArch64: reference |
// neon | neon_dotprod | neon_i8mm) forbids the instruction sets above.
//
// Sums are the same whatever the number of rows, threads or tasks: an element adds up the products
// of a stretch of k in order (a block, or 128 k of a longer one), starting from zero, and then the
// stretches in order, each times its scale. So a token's result depends neither on the tokens it is
// computed with nor on the machine's cores (nor, as they do the same operations, on whether it has
// AVX-512, AVX2 or NEON; tiles have an order of their own, so where there is AMX, it depends on
// whether there are few rows or many).
//
// Rule for the gemm_<isa>.cc files, which are compiled with that ISA's flags: they must not define
// anything that another object may define too. An inline function or template of a shared header
// (std:: included) that is not inlined there becomes a weak symbol full of AVX-512 code, and the
// linker may pick it for everyone. Hence the plain structs and raw pointers of this header.
#pragma once

#include <cstdint>

#include "ops/cpu/row_tiles.h"
#include "ops/problem.h"

namespace qmoe_plugin {

/// y[r][16 * p + n] = sum_k x[r][k] * w[p][n][k] + bias[p][n] for rows r and panels p.
struct GemmArgs {
  // A run of panels of one expert's packed weights.
  const uint8_t* codes;      // [panels, k_padded * 16 * bits / 8]
  const void* block_scales;  // [panels, groups, 16]; null = per channel
  const void* zero_offsets;  // [panels, groups or 1, 16], or null
  const float* row_scales;   // [panels, 16]
  const float* bias;         // [panels, 16], or null
  bool half_scales;          // block_scales and zero_offsets are float16, else float32
  int64_t panels;
  int64_t k_padded;
  int64_t block_size;  // 0 = per channel
  const float* table;  // [256] centered value of a code, repeated for codes under 8 bits; not read
                       // for Codes other than kTable
  // Activations, zero from k to k_padded, as GemmKernel::store writes them. If they are in tiles,
  // these are the tiles of just these rows, and row_bytes and row_index are not read.
  const void* x;
  int64_t row_bytes;         // from a row to the next
  const int32_t* row_index;  // [rows], row r is x[row_index[r]]; null = row r
  int64_t rows;
  float* y;  // [rows, ldy]
  int64_t ldy;
};

/// How codes become numbers.
enum class Codes {
  kTable,   // by GemmArgs::table
  kHalves,  // by GemmArgs::table, and the numbers are multiples of 1/2 from -8 to 8 (e2m1)
  kSigned,  // code - 2^(bits - 1), so that arithmetic can do it
  kE4M3,    // 8-bit floats, which are float16 but for the exponent; NaN is refused when packing
  kFloat16,
  kBFloat16,
  kFloat32
};

using GemmFunction = void (*)(const GemmArgs&);

/// A GEMM, and what it reads activations as.
struct GemmKernel {
  GemmFunction gemm;  // null: there is none
  /// Bytes that 32 values of a row take.
  int64_t bytes_of_32;
  /// Writes values [first, first + count) of a row, both multiples of 32. Null: rows are float32.
  void (*store)(const float* x, int64_t first, int64_t count, const cpu::StoredRow& row);
  /// Rows lie in tiles (ops/cpu/row_tiles.h), of which 32 k take tile_bytes_of_32 besides their rows.
  bool in_tiles = false;
  int64_t tile_bytes_of_32 = 0;

  [[gnu::always_inline]] cpu::TileSize TileSizeOf(int64_t k_padded) const {
    return {k_padded / 32 * bytes_of_32, k_padded / 32 * tile_bytes_of_32};
  }
};
inline constexpr int64_t kFloatsOf32 = 32 * sizeof(float);

/// Rows an expert, on average, from which on tiles are faster than vectors: those of float32, or at
/// level 4 of int8.
constexpr int64_t FewestTileRows(AccuracyLevel level) { return level >= 4 ? 16 : 8; }

/// The functions of one instruction set. Each gemm_<isa>.cc defines one of these.
struct CpuIsa {
  const char* name;  // "avx512"
  /// The GEMM for codes of so many bits.
  GemmFunction (*gemm)(int bits, Codes codes);
  /// The activation, from fc1 sums x to y[n]; x is [n], or [2 n] of (gate, up) pairs when gated.
  void (*activate)(const ActivationParams& params, const float* x, int64_t n, float* y);
  /// y[i] += factor * x[i]
  void (*add_scaled)(float factor, const float* x, int64_t n, float* y);
  /// Conversions from and to float32, float16 or bfloat16 (to nearest even).
  void (*to_float)(const void* x, DType dtype, int64_t n, float* y);
  void (*from_float)(const float* x, int64_t n, DType dtype, void* y);
};

extern const CpuIsa kCpuReference;
#if defined(__x86_64__)
extern const CpuIsa kCpuAvx2;
extern const CpuIsa kCpuAvx512;

/// The GEMMs that round activations, for codes of so many bits in blocks of a multiple of `block`
/// (16 or 32). Each gemm_<isa>_<arithmetic>.cc defines one of these.
GemmKernel Avx512Bf16Gemm(int bits, Codes codes, int block);
GemmKernel Avx512VnniGemm(int bits, Codes codes, int block);
GemmKernel Avx2Int8Gemm(int bits, Codes codes, int block);
GemmKernel AvxVnniGemm(int bits, Codes codes, int block);
GemmKernel AmxGemm(int bits, Codes codes, int block);  // exact
GemmKernel AmxBf16Gemm(int bits, Codes codes, int block);
#elif defined(__aarch64__)
extern const CpuIsa kCpuNeon;

GemmKernel NeonDotprodGemm(int bits, Codes codes, int block);
GemmKernel NeonI8mmGemm(int bits, Codes codes, int block);
#endif

/// What Kernel::launch points to: one instruction set's functions for one format.
struct CpuGemm {
  const CpuIsa* isa;
  GemmKernel blocks32, blocks16;  // for blocks of a multiple of 32 (or none), or only of 16
  float table[256];               // GemmArgs::table, but for formats with a codebook

  const GemmKernel& For(int64_t block_size) const { return block_size % 32 ? blocks16 : blocks32; }
};

/// Registers every kernel with every format. The registry calls it once, after all formats.
void RegisterCpuKernels();

}  // namespace qmoe_plugin
