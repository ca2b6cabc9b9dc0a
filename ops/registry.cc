#include "ops/registry.h"

#include <algorithm>
#include <deque>
#include <mutex>

#include "ops/cpu/gemm.h"
#include "ops/error.h"
#include "ops/tuning.h"

namespace qmoe_plugin {
namespace {

std::deque<Kernel>& Storage() {
  static std::deque<Kernel> kernels;  // a deque never moves its elements
  return kernels;
}

/// Why the kernel cannot run the problem on the device; empty if it can.
std::string Refusal(const Kernel& kernel, const Device& device, const GemmProblem& problem) {
  if (kernel.available != nullptr && !kernel.available())
    return "this processor cannot run it or runs it slowly, or it is switched off";
  if (device.type == DeviceType::kCuda && (device.sm < kernel.min_sm || device.sm > kernel.max_sm))
    return Concat("runs on sm_", kernel.min_sm, " to sm_", kernel.max_sm, ", not sm_", device.sm);
  if (std::find(kernel.dtypes.begin(), kernel.dtypes.end(), problem.dtype) == kernel.dtypes.end())
    return Concat("does not take ", Name(problem.dtype), " activations");
  if (kernel.refuse == nullptr) return {};
  GemmProblem here = problem;
  here.sm = device.sm;
  return kernel.refuse(here);
}

}  // namespace

const char* Name(GemmStage stage) {
  switch (stage) {
    case GemmStage::kFc1:
      return "fc1";
    case GemmStage::kFc2:
      return "fc2";
    case GemmStage::kDense:
      break;
  }
  return "dense";
}

bool RegisterKernel(Kernel kernel) {
  Storage().push_back(std::move(kernel));
  return true;
}

std::vector<const Kernel*> Kernels() {
  // The CPU kernels take any registered format, so they enter once all formats are there.
  static std::once_flag cpu_kernels;
  std::call_once(cpu_kernels, RegisterCpuKernels);
  std::vector<const Kernel*> kernels;
  for (const Kernel& kernel : Storage()) kernels.push_back(&kernel);
  std::sort(kernels.begin(), kernels.end(), [](const Kernel* a, const Kernel* b) {
    return std::pair(a->device, a->name) < std::pair(b->device, b->name);
  });
  return kernels;
}

std::vector<Verdict> Explain(const Device& device, const GemmProblem& problem) {
  std::vector<Verdict> verdicts;
  for (const Kernel* kernel : Kernels())
    if (kernel->device == device.type && kernel->format == problem.format)
      verdicts.push_back({kernel, Refusal(*kernel, device, problem)});
  std::stable_sort(verdicts.begin(), verdicts.end(), [](const Verdict& a, const Verdict& b) {
    return a.kernel->priority > b.kernel->priority;
  });
  for (const TunedRows& tuned : Tuned(device, problem)) {
    if (problem.rows < tuned.first || problem.rows > tuned.last) continue;
    std::stable_partition(verdicts.begin(), verdicts.end(), [&](const Verdict& verdict) {
      return verdict.kernel == tuned.kernel && verdict.refusal.empty();
    });
    break;
  }
  return verdicts;
}

const Kernel& Select(const Device& device, const GemmProblem& problem) {
  const std::vector<Verdict> verdicts = Explain(device, problem);
  std::string reasons;
  for (const Verdict& verdict : verdicts) {
    if (verdict.refusal.empty()) return *verdict.kernel;
    reasons += Concat("\n  ", verdict.kernel->name, ": ", verdict.refusal);
  }
  if (reasons.empty())
    reasons = Concat("\n  none was compiled in for format ", problem.format->name);
  FailUnsupported(
      "no kernel on ", device.Describe(), " runs ", Describe(problem), ":", reasons,
      "\nLeave the node in com.microsoft, or quantize it to a format of the support table "
      "(python -m qmoe_plugin kernels)");
}

std::string Describe(const GemmProblem& p) {
  return Concat(Name(p.stage), " ", p.format->name,
                p.block_size        ? Concat(" block ", p.block_size)
                : p.format->plain() ? ""
                                    : " per channel",
                p.zero_points ? " with zero points" : "", ", ", p.experts,
                p.experts == 1 ? " expert, " : " experts, ", p.n, " x ", p.k, ", ", p.rows,
                p.rows == 1 ? " row, " : " rows, ", Name(p.dtype));
}

}  // namespace qmoe_plugin
