// The MatMulNBits op and its like, free of ONNX Runtime: Y[M, N] = A[M, K] dequant(B)[N, K]^T + bias[N],
// A perhaps quantised to e4m3 first.
#pragma once

#include <memory>

#include "ops/pack_source.h"
#include "ops/problem.h"

namespace qmoe_plugin {

class MatMulNBits {
 public:
  virtual ~MatMulNBits() = default;

  /// Scratch memory of a run with this many rows, on the device.
  virtual size_t WorkspaceBytes(int64_t m) const = 0;

  /// Header of the packed weights: what they are and how large, for the log.
  virtual PackedHeader Packed() const = 0;

  /// Runs (CUDA: enqueues on the stream, without ever synchronizing or allocating). Thread-safe.
  virtual void Run(const MatMulTensors& tensors, const ExecutionContext& context) const = 0;
};

/// Checks everything, selects kernels and packs. The weights may be released afterwards, except for
/// those that are packed already and the CPU's. Throws Error. `weights.experts` is 1; bias and group_index are optional.
std::unique_ptr<MatMulNBits> MakeMatMulNBits(const Device& device, const MatMulConfig& config,
                                             const Projection& weights);

/// Packs the weights for a device, which need not be here, under the name "B". Throws Error.
void PrepackMatMulNBits(const Device& device, const MatMulConfig& config, const Projection& weights,
                        const AllocatePacked& allocate);

// One implementation a device; MakeMatMulNBits checks the config and calls one of them.
std::unique_ptr<MatMulNBits> MakeCpuMatMulNBits(const MatMulConfig& config,
                                                const PackSource& weights);
std::unique_ptr<MatMulNBits> MakeCudaMatMulNBits(const Device& device, const MatMulConfig& config,
                                                 const PackSource& weights);

}  // namespace qmoe_plugin
