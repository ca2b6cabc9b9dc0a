// The inner loops of packing, compiled once for the baseline and once more for AVX2.
//
// Both are the same plain C++ (ops/pack_loops.inc), which compilers vectorise. Results are the same
// bits. As for the kernels (ops/cpu/gemm.h), the file for AVX2 must not define anything that another
// object may define too.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace qmoe_plugin {

struct PackLoops {
  /// The codes of `bytes` packed bytes, one byte each, lowest bits first; `bits` is 2 or 4.
  void (*unpack)(const uint8_t* packed, int64_t bytes, int bits, uint8_t* codes);
  /// Codes [16][k] of up to 8 bits as a panel of ops/cpu/layout.h; k is a multiple of 32.
  void (*panel)(const uint8_t* codes, int64_t k, int bits, uint8_t* out);
  /// Whether one of `count` codes is equal to `code`.
  bool (*contains)(const uint8_t* codes, int64_t count, uint8_t code);
  /// out[i] = float of element i, of any type of which IsScale() is true.
  void (*to_float)(const void* data, DType dtype, int64_t count, float* out);
  /// x[i] *= factor; false if a product is not finite.
  bool (*multiply)(float factor, int64_t count, float* x);
  /// The largest |x[i]|, of finite numbers.
  float (*largest)(const float* x, int64_t count);
  /// Whether float16 holds each x[i] * factor exactly.
  bool (*fit_half)(const float* x, float factor, int64_t count);
  /// Whether float16 also holds (x[i] * factor as float16) * smaller exactly. smaller: a power of two.
  bool (*fit_smaller_half)(const float* x, float factor, float smaller, int64_t count);
  /// out[16 i] = float16 of x[i] * factor, rounded to nearest even.
  void (*store_half)(const float* x, float factor, int64_t count, uint16_t* out);
};

/// Those for this processor.
const PackLoops& GetPackLoops();

extern const PackLoops kPackLoopsPortable;
#ifdef __x86_64__
extern const PackLoops kPackLoopsAvx2;
#endif

}  // namespace qmoe_plugin
