#include "ops/cpu/gemm.h"

#include <cstdlib>
#include <deque>
#include <string>
#include <string_view>

#include "ops/common/float_codes.h"
#include "ops/error.h"
#include "ops/registry.h"

namespace qmoe_plugin {
namespace {

enum Level { kReference, kAvx2, kAvx512 };

/// The highest level that QMOE_PLUGIN_CPU_ISA allows; read each time, so that a test may change it.
Level AllowedLevel() {
  const char* value = std::getenv("QMOE_PLUGIN_CPU_ISA");
  const std::string_view name = value == nullptr ? "" : value;
  if (name.empty() || name == "avx512") return kAvx512;
  if (name == "avx2") return kAvx2;
  if (name == "reference") return kReference;
  FailInvalid("environment variable QMOE_PLUGIN_CPU_ISA is '", name,
              "'; allowed are reference, avx2 and avx512, or leave it unset for the best level");
}

#if defined(__x86_64__)
bool Avx2Available() {
  return AllowedLevel() >= kAvx2 && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool Avx512Available() {
  return AllowedLevel() >= kAvx512 && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && Avx2Available();
}
#endif

/// The reference runs at every level, but a wrong level must not go unnoticed.
bool ReferenceAvailable() { return AllowedLevel() >= kReference; }

std::string Refuse(const GemmProblem& problem) {
  if (problem.block_size % 16 != 0)
    return Concat("needs a block size that is a multiple of 16, not ", problem.block_size);
  return {};
}

Codes CodesOf(const Format& format) {
  if (format.plain_type == DType::kFloat16) return Codes::kFloat16;
  if (format.plain_type == DType::kBFloat16) return Codes::kBFloat16;
  if (format.plain_type == DType::kFloat32) return Codes::kFloat32;
  const int codes = 1 << format.bits;
  bool is_signed = true, is_e4m3 = format.bits == 8;
  for (int code = 0; code < codes; ++code) {
    const float value = format.centered[code];
    is_signed &= value == float(code - codes / 2);
    is_e4m3 &= (code & 0x7f) == 0x7f || value == DecodeE4M3(uint32_t(code));
  }
  return is_signed ? Codes::kSigned : is_e4m3 ? Codes::kE4M3 : Codes::kTable;
}

/// The values of the codes, repeated for those under 8 bits; zeros for plain formats.
void FillTable(const Format& format, float* table) {
  for (int i = 0; i < 256; ++i)
    table[i] = format.plain() ? 0.0f : format.centered[i & ((1 << format.bits) - 1)];
}

void Register(const CpuIsa& isa, int priority, bool (*available)()) {
  static std::deque<CpuGemm> launches;  // live as long as the registry; a deque never moves them
  for (const Format* format : Formats()) {
    CpuGemm& launch =
        launches.emplace_back(CpuGemm{&isa, isa.gemm(format->bits, CodesOf(*format)), {}});
    FillTable(*format, launch.table);
    const std::string stem = std::string("gemm_") + isa.name;
    RegisterKernel({.name = stem + "." + format->name,
                    .stem = stem,
                    .format = format,
                    .device = DeviceType::kCpu,
                    .dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
                    .layout = Layout::kCpuPanel16,
                    .priority = priority,
                    .limits = "per channel, or blocks of a multiple of 16; float32 arithmetic",
                    .refuse = Refuse,
                    .available = available,
                    .launch = &launch});
  }
}

}  // namespace

void RegisterCpuKernels() {
  Register(kCpuReference, 0, ReferenceAvailable);
#if defined(__x86_64__)
  Register(kCpuAvx2, 10, Avx2Available);
  Register(kCpuAvx512, 20, Avx512Available);
#endif
}

}  // namespace qmoe_plugin
