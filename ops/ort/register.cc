// The entry point: ONNX Runtime loads the library, finds RegisterCustomOps by name and calls it.
//
// Our ops are registered in our own domain. With the session's config entry kOverrideKey they are
// registered in com.microsoft, too, where they take the place of ONNX Runtime's ops of these names:
// all of them, as a domain has one op of a name, so a node that we refuse fails the session.
#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <mutex>
#include <span>

#include "ops/domain.h"
#include "ops/ort/custom_op.h"
#include "ops/ort/versions.h"

namespace qmoe_plugin::ort {
namespace {

constexpr char kOverrideKey[] = "qmoe_plugin.override_com_microsoft";

/// The ops of one domain as one runtime knows them. ONNX Runtime keeps pointers to the objects and
/// frees none, so they live for ever, and all sessions of a runtime share them.
struct Registration {
  const OrtApi* table;
  const char* name;          // kDomain or kStockDomain
  std::deque<CustomOp> ops;  // a deque never moves its elements
  OrtCustomOpDomain* domain = nullptr;
};

/// The API version that "1.31.1" offers: 31. A later major version is taken to have all of ours.
uint32_t OfferedVersion(const char* release) {
  unsigned major = 0, minor = 0;
  if (!release || std::sscanf(release, "%u.%u", &major, &minor) != 2) return 0;
  return major > 1 ? kHighestApiVersion : major == 1 ? minor : 0;
}

/// The types of a set of scales that an op has objects for.
std::span<const DType> ScaleTypes(const OpSpec& spec, ScaleSet set, uint32_t version) {
  static constexpr DType kNone[] = {DType::kUndefined};
  static_assert(kScaleTypes[std::size(kScaleTypes) - 1] == DType::kFloat8E8M0);
  const std::span<const DType> known(kScaleTypes,
                                     std::size(kScaleTypes) - (version < kE8M0Version ? 1 : 0));
  const bool has_scales = std::any_of(spec.inputs.begin(), spec.inputs.end(),
                                      [set](const InputSpec& input) { return input.scale == set; });
  return has_scales ? known : kNone;
}

void AddOps(Registration& registration, uint32_t version) {
  const Api api(registration.table);
  for (const OpSpec* spec :
       {&QMoeOp(), &MoEOp(), &MatMulNBitsOp(), &Fp8WeightOp(), &Fp4WeightOp()}) {
    for (const DeviceType device : {DeviceType::kCpu, DeviceType::kCuda}) {
      if (device == DeviceType::kCuda && !BuiltWithCuda()) continue;
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        for (const DType first : ScaleTypes(*spec, ScaleSet::kFirst, version))
          for (const DType second : ScaleTypes(*spec, ScaleSet::kSecond, version))
            registration.ops.emplace_back(api, version, registration.name, *spec, device, dtype,
                                          std::array{first, second});
    }
  }
  api.Call<slot::CreateCustomOpDomain>(registration.name, &registration.domain);
  for (const CustomOp& op : registration.ops)
    api.Call<slot::CustomOpDomain_Add>(registration.domain, static_cast<const OrtCustomOp*>(&op));
}

/// The domain of that name in the runtime that owns `table`; made at its first use.
OrtCustomOpDomain* DomainFor(const OrtApi* table, uint32_t version, const char* name) {
  static std::mutex mutex;
  static auto& registrations = *new std::deque<Registration>;
  const std::lock_guard lock(mutex);
  for (const Registration& registration : registrations)
    if (registration.table == table && registration.name == name) return registration.domain;
  registrations.push_back({table, name, {}, nullptr});
  try {
    AddOps(registrations.back(), version);
  } catch (...) {
    registrations.pop_back();
    throw;
  }
  return registrations.back().domain;
}

/// Whether the session wants our ops in com.microsoft.
bool WantsOverride(const Api& api, const OrtSessionOptions* options) {
  int given = 0;
  api.Call<slot::HasSessionConfigEntry>(options, kOverrideKey, &given);
  if (!given) return false;
  const std::string value = api.String<slot::GetSessionConfigEntry>(options, kOverrideKey);
  QMOE_REQUIRE(value == "0" || value == "1", "session config entry ", kOverrideKey, " is \"", value,
               "\"; it must be \"0\" or \"1\"");
  return value == "1";
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
    const Api api(table);
    const bool override = WantsOverride(api, options);
    api.Call<slot::AddCustomOpDomain>(options, DomainFor(table, version, kDomain));
    if (override)
      api.Call<slot::AddCustomOpDomain>(options, DomainFor(table, version, kStockDomain));
  });
}
