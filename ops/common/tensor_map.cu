#include "ops/common/tensor_map.h"

#include <cudaTypedefs.h>

#include "ops/common/cuda_host.h"

namespace qmoe_plugin {
namespace {

/// The driver's function, looked up at run time: the library must load where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 Encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CheckCuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                               cudaEnableDefault, &found),
              "looking for cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      FailRuntime("the NVIDIA driver has no cuTensorMapEncodeTiled; it is older than CUDA 12.0");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

}  // namespace

CUtensorMap MakeTensorMap(const BoxedMatrix& matrix) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {matrix.columns, matrix.rows}, strides[1] = {matrix.row_bytes};
  const cuuint32_t box[2] = {matrix.box_columns, matrix.box_rows}, steps[2] = {1, 1};
  const CUresult status =
      Encoder()(&map, matrix.type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, matrix.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    FailRuntime("the NVIDIA driver refused a tensor map of ", matrix.rows, " rows of ",
                matrix.row_bytes, " bytes (error ", int(status), ")");
  return map;
}

}  // namespace qmoe_plugin
