// Quantises rows of activations on the device, as ops/qmoe/activation_quant.h says.
#pragma once

#include <cuda_runtime.h>

#include "ops/problem.h"

namespace qmoe_plugin {

struct ActivationQuantArgs {
  DType dtype;  // of x and y
  ActivationQuant mode;
  const void* x;      // [*, k]
  const int* x_rows;  // [rows] row of x of each row of y; null = the row itself
  int64_t rows;
  int k;
  const float* scales;  // kFp8: [experts]
  const int*
      expert_offsets;  // [experts + 1] first row of y of each expert; null = scales[0] for all
  int experts;
  void* y;  // [rows, k]; may be x where x_rows is null
};

void LaunchActivationQuant(const ActivationQuantArgs& args, cudaStream_t stream);
void PrepareActivationQuant(DType dtype);

}  // namespace qmoe_plugin
