// Which kernels there are, and which one runs.
//
// A kernel says no with a reason: `refuse` returns why it cannot run a problem, or an empty string.
// The first kernel in order of priority that runs on the device and does not refuse is taken. What
// a kernel launches is its device's business: `launch` points to a CudaGemm (ops/gemm/gemm.cuh) or
// a CpuGemm (ops/cpu/gemm.h).
#pragma once

#include <string>
#include <vector>

#include "ops/packed_weights.h"
#include "ops/problem.h"

namespace qmoe_plugin {

struct Kernel {
  std::string name;  // "<file>.<format>", as in grouped_gemm_sm80.int4; also its profiler range and
                     // its test id
  std::string stem;  // "<file>", as in grouped_gemm_sm80
  const Format* format = nullptr;
  DeviceType device = DeviceType::kCpu;
  int min_sm = 0, max_sm = 0;           // CUDA: compute capabilities it runs on, both included
  std::vector<DType> dtypes;            // activation types
  Layout layout = Layout::kCpuPanel16;  // of the packed weights it reads
  int priority = 0;                     // higher is tried first
  std::string limits;                   // one line for the support table
  /// Why this kernel cannot run the problem; empty if it can. Asked only for its own device, SM,
  /// format and dtype.
  std::string (*refuse)(const GemmProblem&) = nullptr;
  /// CPU: whether this processor can run it, and not slower than a more exact kernel (and no
  /// environment variable forbids it). Null = always.
  bool (*available)() = nullptr;
  const void* launch = nullptr;
};

/// Called at load time by each kernel's translation unit.
bool RegisterKernel(Kernel kernel);

/// All kernels, by device, then name.
std::vector<const Kernel*> Kernels();

/// The kernels for this format on this device, highest priority first (but for one that a tuning file
/// prefers, see ops/tuning.h), each with the reason why it does not run the problem (empty for those
/// that can).
struct Verdict {
  const Kernel* kernel;
  std::string refusal;
};
std::vector<Verdict> Explain(const Device& device, const GemmProblem& problem);

/// The kernel that runs the problem; throws an Error with every refusal when there is none.
const Kernel& Select(const Device& device, const GemmProblem& problem);

/// "fc1", "fc2" or "dense".
const char* Name(GemmStage stage);

/// Short text of a problem for messages: "fc1 int4 block 32, 32 experts, 5760 x 2880, 4 rows,
/// float16".
std::string Describe(const GemmProblem& problem);

}  // namespace qmoe_plugin
