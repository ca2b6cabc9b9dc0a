// The CPU's kernels: grouped GEMM y = x W^T + bias on panels (ops/cpu/layout.h), float32 inside.
//
//   gemm_reference.<format>   portable C++; runs everywhere, oracle of the tests
//   gemm_avx2.<format>        AVX2, FMA, F16C
//   gemm_avx512.<format>      AVX-512 F, BW, VL, DQ
//
// All take every registered format (2, 4 or 8 bits: codes are decoded by a table, or as signed
// integers where the format allows; plain floats), every activation type, per channel and any block
// size that is a multiple of 16. The highest level that the processor has is used; environment variable
// QMOE_PLUGIN_CPU_ISA = reference | avx2 | avx512 lowers it.
//
// Sums are the same whatever the number of rows, threads or tasks: an element adds up the products
// of a stretch of k in order (a block, or 128 k of a longer one), starting from zero, and then the
// stretches in order, each times its scale. So a token's result depends neither on the tokens it is
// computed with nor on the machine's cores (nor, as they do the same operations, on whether it has
// AVX-512 or only AVX2).
//
// Rule for the gemm_<isa>.cc files, which are compiled with that ISA's flags: they must not define
// anything that another object may define too. An inline function or template of a shared header
// (std:: included) that is not inlined there becomes a weak symbol full of AVX-512 code, and the
// linker may pick it for everyone. Hence the plain structs and raw pointers of this header.
#pragma once

#include <cstdint>

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
  // Activations, zero from k to k_padded.
  const float* x;  // [*, ldx]
  int64_t ldx;
  const int32_t* row_index;  // [rows], row r is x[row_index[r]]; null = row r
  int64_t rows;
  float* y;  // [rows, ldy]
  int64_t ldy;
};

/// How codes become numbers.
enum class Codes {
  kTable,   // by GemmArgs::table
  kSigned,  // code - 2^(bits - 1), so that arithmetic can do it
  kE4M3,    // 8-bit floats, which are float16 but for the exponent; NaN is refused when packing
  kFloat16,
  kBFloat16,
  kFloat32
};

using GemmFunction = void (*)(const GemmArgs&);

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
#endif

/// What Kernel::launch points to: one instruction set's functions for one format.
struct CpuGemm {
  const CpuIsa* isa;
  GemmFunction gemm;
  float table[256];  // GemmArgs::table, but for formats with a codebook
};

/// Registers every kernel with every format. The registry calls it once, after all formats.
void RegisterCpuKernels();

}  // namespace qmoe_plugin
