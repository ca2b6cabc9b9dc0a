// Which kernels a measurement on the user's GPU prefers: a file that `python -m qmoe_plugin tune` writes and environment
// variable QMOE_PLUGIN_TUNING names. It puts one of the kernels that do not refuse a problem before those of higher
// priority, and changes nothing else.
//
//   qmoe_plugin tuning 1
//   device sm_90 NVIDIA H200
//   kernels 8c5be1f2a0d7e339
//   fc1 int4 float16 experts 32 topk 4 n 5760 k 2880 block_size 32 zero_points 0 rows 1 16 kernel grouped_gemm_sm80
//
// `kernels` stands for the version and the CUDA kernels of the build: numbers of another one say nothing.
#pragma once

#include <string>
#include <vector>

#include "ops/registry.h"

namespace qmoe_plugin {

/// A kernel that is preferred for a problem with so many rows.
struct TunedRows {
  int64_t first, last;
  const Kernel* kernel;
};

/// The lines that a file for a device begins with.
std::string TuningHeader(const Device& device, const std::string& device_name);

/// What the file prefers for a problem on a device, whatever its rows; empty if there is no file. Throws Error if the file
/// cannot be read or is damaged, or was made on another device or by another build.
std::vector<TunedRows> Tuned(const Device& device, const std::string& device_name,
                             const GemmProblem& problem);

/// The same where there is no device to ask for its name: empty if the file is for another compute capability.
std::vector<TunedRows> Tuned(const Device& device, const GemmProblem& problem);

}  // namespace qmoe_plugin
