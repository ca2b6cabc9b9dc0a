// include/qmoe_plugin.h on top of the kernel registry.
#include <algorithm>
#include <array>
#include <deque>
#include <string>
#include <string_view>

#include "include/qmoe_plugin.h"
#include "ops/device.h"
#include "ops/error.h"
#include "ops/ort/versions.h"
#include "ops/registry.h"
#include "ops/tuning.h"

namespace qmoe_plugin {
namespace {

/// A row of the support table with the strings that it points to.
struct KernelRow {
  const Kernel* kernel;
  std::string dtypes;
};

/// Made at first use, never changed: callers keep pointers into it.
const std::deque<KernelRow>& KernelRows() {
  static const auto& rows = *new std::deque<KernelRow>([] {
    std::deque<KernelRow> made;
    for (const Kernel* kernel : Kernels()) {
      KernelRow row{kernel, ""};
      for (const DType dtype : kernel->dtypes) {
        if (!row.dtypes.empty()) row.dtypes += ' ';
        row.dtypes += Name(dtype);
      }
      made.push_back(std::move(row));
    }
    return made;
  }());
  return rows;
}

const char* DeviceName(DeviceType device) { return device == DeviceType::kCuda ? "CUDA" : "CPU"; }

template <class Value>
struct Choice {
  std::string_view name;
  Value value;
};

/// The value called `name`; throws an Error that lists the allowed names.
template <class Value, size_t Count>
Value Parse(const char* what, const char* name, const std::array<Choice<Value>, Count>& choices) {
  std::string allowed;
  for (const Choice<Value>& choice : choices) {
    if (name && choice.name == name) return choice.value;
    if (!allowed.empty()) allowed += ", ";
    allowed += choice.name;
  }
  FailInvalid(what, " is \"", name ? name : "(null)", "\"; allowed are ", allowed);
}

constexpr std::array<Choice<DeviceType>, 2> kDevices{
    {{"CPU", DeviceType::kCpu}, {"CUDA", DeviceType::kCuda}}};
constexpr std::array<Choice<GemmStage>, 3> kStages{
    {{"fc1", GemmStage::kFc1}, {"fc2", GemmStage::kFc2}, {"dense", GemmStage::kDense}}};
constexpr std::array<Choice<DType>, 3> kDTypes{
    {{"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}}};
constexpr std::array<Choice<Activation>, 6> kActivations{{{"identity", Activation::kIdentity},
                                                          {"relu", Activation::kRelu},
                                                          {"gelu", Activation::kGelu},
                                                          {"silu", Activation::kSilu},
                                                          {"swiglu", Activation::kSwiglu},
                                                          {"geglu", Activation::kGeglu}}};

std::vector<Verdict> ExplainProblem(const qmoe_plugin_gemm_problem& p) {
  Device device;
  device.type = Parse("device", p.device, kDevices);
  device.sm = device.type == DeviceType::kCuda ? p.sm : 0;
  GemmProblem problem;
  problem.stage = Parse("stage", p.stage, kStages);
  problem.dtype = Parse("dtype", p.dtype, kDTypes);
  problem.format = &GetFormat(p.format ? p.format : "");
  problem.experts = p.experts;
  problem.rows = p.rows;
  QMOE_REQUIRE(p.topk >= 1 && p.topk <= std::max<int64_t>(p.experts, 1) && p.rows % p.topk == 0,
               "topk is ", p.topk, "; it must be from 1 to the number of experts, ", p.experts,
               ", and a divisor of rows, ", p.rows);
  problem.topk = p.topk;
  problem.n = p.n;
  problem.k = p.k;
  problem.block_size = p.block_size;
  problem.zero_points = p.zero_points != 0;
  problem.activation = Parse("activation", p.activation, kActivations);
  problem.accuracy_level = p.accuracy_level;
  return Explain(device, problem);
}

}  // namespace
}  // namespace qmoe_plugin

using namespace qmoe_plugin;

const char* qmoe_plugin_version(void) { return QMOE_PLUGIN_VERSION; }

void qmoe_plugin_ort_api_range(uint32_t* lowest, uint32_t* highest) {
  *lowest = ort::kLowestApiVersion;
  *highest = ort::kHighestApiVersion;
}

int qmoe_plugin_has_cuda(void) { return BuiltWithCuda(); }

const char* qmoe_plugin_cuda_archs(void) { return QMOE_PLUGIN_CUDA_ARCHS; }

int qmoe_plugin_cuda_device_count(void) { return CudaDeviceCount(); }

int qmoe_plugin_cuda_device_sm(int device) {
  try {
    return device >= 0 && device < CudaDeviceCount() ? CudaDevice(device).sm : 0;
  } catch (...) {
    return 0;
  }
}

const char* qmoe_plugin_tuning_header(int device) {
  static thread_local std::string header;
  try {
    const bool is_there = device >= 0 && device < CudaDeviceCount();
    header = is_there ? TuningHeader(CudaDevice(device), CudaDeviceName(device)) : "";
  } catch (...) {
    header.clear();
  }
  return header.c_str();
}

size_t qmoe_plugin_kernel_count(void) {
  try {
    return KernelRows().size();
  } catch (...) {
    return 0;
  }
}

int qmoe_plugin_get_kernel(size_t index, qmoe_plugin_kernel* out) {
  if (!out || index >= qmoe_plugin_kernel_count()) return -1;
  const auto& [kernel, dtypes] = KernelRows()[index];
  *out = {kernel->name.c_str(),   kernel->format->name, DeviceName(kernel->device),
          kernel->min_sm,         kernel->max_sm,       dtypes.c_str(),
          kernel->limits.c_str(), kernel->priority,     !kernel->available || kernel->available()};
  return 0;
}

int qmoe_plugin_explain(const qmoe_plugin_gemm_problem* problem,
                        void (*visit)(void* user, const char* kernel, const char* refusal),
                        void* user) {
  try {
    for (const Verdict& verdict : ExplainProblem(*problem))
      visit(user, verdict.kernel->name.c_str(), verdict.refusal.c_str());
    return 0;
  } catch (const std::exception& error) {
    visit(user, "", error.what());
  } catch (...) {
    visit(user, "", "unknown exception");
  }
  return -1;
}
