// Weights packed on a device, together with the choice of the kernel that multiplies by them.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "ops/gemm/gemm.cuh"
#include "ops/pack_source.h"
#include "ops/registry.h"
#include "ops/tuning.h"

namespace qmoe_plugin {

class PackedGemm {
 public:
  /// Which kernel runs, in tiles of how many rows.
  struct Choice {
    const Kernel* kernel;
    int tile_rows;

    const CudaGemm& gemm() const { return *static_cast<const CudaGemm*>(kernel->launch); }
  };

  /// Brings the packed weights onto the device. `problem` says all but the rows of x.
  PackedGemm(const Device& device, const GemmProblem& problem, const ActivationParams& activation,
             const PackSource& source);

  /// What Select() of ops/registry.h says for so many rows, without sorting the registry each time.
  Choice Choose(int64_t rows) const;

  const PackedHeader& header() const { return weights_.header; }
  int64_t row_tiles() const { return weights_.shape.row_tiles; }

  /// Arguments with everything about the weights filled in.
  CudaGemmArgs Args(const Choice& choice) const;

  /// Launches the chosen kernel, with a range of its name for profilers.
  void Launch(const Choice& choice, const CudaGemmArgs& args, cudaStream_t stream) const;
  void LaunchRouted(const Choice& choice, const CudaGemmArgs& args, const FusedRoute& route,
                    cudaStream_t stream) const;

 private:
  void Upload(const PackSource& source);

  Device device_;
  GemmProblem problem_;
  ActivationParams activation_;
  PackedWeights weights_;
  int multiprocessors_ = 0;
  std::vector<const Kernel*> candidates_;  // highest priority first
  std::vector<TunedRows> tuned_;           // of them
};

}  // namespace qmoe_plugin
