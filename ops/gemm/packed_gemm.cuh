// Weights packed on a device, together with the choice of the kernel that multiplies by them.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "ops/gemm/gemm.cuh"
#include "ops/packed_weights.h"
#include "ops/registry.h"
#include "ops/weights.h"

namespace qmoe_plugin {

class PackedGemm {
 public:
  /// Which kernel runs, in tiles of how many rows.
  struct Choice {
    const CudaGemm* gemm;
    int tile_rows;
  };

  /// Packs the reader's rows onto the device. `problem` says all but the rows; its activation is
  /// that of `activation`. Launches will have multiples of `row_step` rows (topk, or 1).
  PackedGemm(const Device& device, const GemmProblem& problem, int64_t row_step,
             const ActivationParams& activation, const RowReader& reader);

  const PackedHeader& header() const { return weights_.header; }

  /// Cheap and lock-free for a few rows, where it matters.
  Choice Choose(int64_t rows) const;

  /// Arguments with everything about the weights filled in.
  GemmArgs Args(const Choice& choice) const;

 private:
  void Upload(const RowReader& reader);
  Choice Select(int64_t rows) const;

  Device device_;
  GemmProblem problem_;
  int64_t row_step_;
  ActivationParams activation_;
  PackedWeights weights_;
  std::vector<Choice> choices_;  // for i * row_step rows
};

}  // namespace qmoe_plugin
