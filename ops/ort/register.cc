// The entry point: ONNX Runtime loads the library, finds RegisterCustomOps by name and calls it.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <mutex>
#include <span>

#include "ops/domain.h"
#include "ops/ort/custom_op.h"
#include "ops/ort/versions.h"

namespace qmoe_plugin::ort {
namespace {

/// The ops as one runtime knows them. ONNX Runtime keeps pointers to the objects and frees none, so
/// they live for ever, and all sessions of a runtime share them.
struct Registration {
  const OrtApi* table;
  std::deque<CustomOp> ops;  // a deque never moves its elements
  OrtCustomOpDomain* domain = nullptr;
};

/// The API version that "1.31.1" offers: 31. A later major version is taken to have all of ours.
uint32_t OfferedVersion(const char* release) {
  unsigned major = 0, minor = 0;
  if (!release || std::sscanf(release, "%u.%u", &major, &minor) != 2) return 0;
  return major > 1 ? kHighestApiVersion : major == 1 ? minor : 0;
}

/// The types of scales that an op has objects for.
std::span<const DType> ScaleTypes(const OpSpec& spec, uint32_t version) {
  static constexpr DType kNone[] = {DType::kUndefined};
  static_assert(kScaleTypes[std::size(kScaleTypes) - 1] == DType::kFloat8E8M0);
  const std::span<const DType> known(kScaleTypes,
                                     std::size(kScaleTypes) - (version < kE8M0Version ? 1 : 0));
  const bool has_scales = std::any_of(spec.inputs.begin(), spec.inputs.end(),
                                      [](const InputSpec& input) { return input.scale; });
  return has_scales ? known : kNone;
}

void AddOps(Registration& registration, uint32_t version) {
  const Api api(registration.table);
  for (const OpSpec* spec : {&QMoeOp(), &MatMulNBitsOp()}) {
    for (const DeviceType device : {DeviceType::kCpu, DeviceType::kCuda}) {
      if (device == DeviceType::kCuda && !BuiltWithCuda()) continue;
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        for (const DType scales : ScaleTypes(*spec, version))
          registration.ops.emplace_back(api, version, *spec, device, dtype, scales);
    }
  }
  api.Call<slot::CreateCustomOpDomain>(kDomain, &registration.domain);
  for (const CustomOp& op : registration.ops)
    api.Call<slot::CustomOpDomain_Add>(registration.domain, static_cast<const OrtCustomOp*>(&op));
}

/// The domain of the runtime that owns `table`; made at its first use.
OrtCustomOpDomain* DomainFor(const OrtApi* table, uint32_t version) {
  static std::mutex mutex;
  static auto& registrations = *new std::deque<Registration>;
  const std::lock_guard lock(mutex);
  for (const Registration& registration : registrations)
    if (registration.table == table) return registration.domain;
  registrations.push_back({table, {}, nullptr});
  try {
    AddOps(registrations.back(), version);
  } catch (...) {
    registrations.pop_back();
    throw;
  }
  return registrations.back().domain;
}

}  // namespace
}  // namespace qmoe_plugin::ort

extern "C" __attribute__((visibility("default"))) qmoe_plugin::ort::OrtStatus* RegisterCustomOps(
    qmoe_plugin::ort::OrtSessionOptions* options, const qmoe_plugin::ort::OrtApiBase* base) {
  using namespace qmoe_plugin;
  using namespace qmoe_plugin::ort;
  const char* release = base->GetVersionString();
  // Asking for a version that the runtime does not have prints to stderr, so ask for one it has.
  const uint32_t version = std::min(OfferedVersion(release), kHighestApiVersion);
  const OrtApi* oldest = base->GetApi(1);
  if (!oldest)
    return nullptr;  // no known runtime lacks version 1, and without it not even an error can be
                     // made
  return Guard(Api(oldest), "qmoe_plugin: ", [&] {
    const OrtApi* table = version >= kLowestApiVersion ? base->GetApi(version) : nullptr;
    if (!table) {
      FailUnsupported("this is ONNX Runtime ", release ? release : "(unknown version)", ", but 1.",
                      kLowestApiVersion,
                      " or newer is needed; upgrade onnxruntime or onnxruntime-gpu");
    }
    Api(table).Call<slot::AddCustomOpDomain>(options, DomainFor(table, version));
  });
}
