// Brings the experts' rows back to tokens and adds them up.
#pragma once

#include <cuda_runtime.h>

#include "ops/common/cuda_host.h"
#include "ops/dtype.h"

namespace qmoe_plugin {

struct UnpermuteArgs {
  DType dtype;            // of output, and of y
  bool y_is_float;        // y is float32 instead
  const void* y;          // [tokens * topk, H] sorted rows, 16-byte aligned
  const int* sorted_row;  // [tokens, topk]
  const float* scales;    // [tokens, topk]
  int tokens, topk;
  int hidden_size;  // H
  void* output;     // [tokens, H]
  /// With the kernel before it, which must not let this one start before sorted_row and scales are there.
  Overlap overlap;
};

/// output[t] = sum over j of scales[t, j] * y[sorted_row[t, j]], in float32 in the order of j,
/// rounded once.
void LaunchUnpermute(const UnpermuteArgs& args, cudaStream_t stream);
void PrepareUnpermute(DType dtype);

}  // namespace qmoe_plugin
