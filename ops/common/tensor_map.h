// Descriptions of matrices for the tensor copies of Hopper and later (TensorCopy in ops/common/hopper.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace qmoe_plugin {

/// A row-major matrix in device memory, of which boxes are copied. `data`, `row_bytes` and the bytes of a box's row are multiples of
/// 16; a box has at most 256 rows and columns.
struct BoxedMatrix {
  const void* data;
  CUtensorMapDataType type;
  uint64_t columns, rows;
  uint64_t row_bytes;  // from one row to the next
  uint32_t box_columns, box_rows;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;  // of a box in shared memory
};

/// Throws Error if the driver does not take it.
CUtensorMap MakeTensorMap(const BoxedMatrix& matrix);

}  // namespace qmoe_plugin
