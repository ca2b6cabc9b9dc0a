#include "tests/cpp/emulated/kernels.h"

#include <deque>
#include <string>

#include "ops/cpu/gemm.h"
#include "ops/registry.h"

namespace qmoe_plugin {

GemmKernel EmulatedAmxGemm(int bits, Codes codes, int block);
GemmKernel EmulatedAmxBf16Gemm(int bits, Codes codes, int block);
GemmKernel EmulatedAvxVnniGemm(int bits, Codes codes, int block);

namespace {

using SelectFunction = GemmKernel (*)(int bits, Codes codes, int block);

struct Emulation {
  const char* real;
  SelectFunction select_real, select;
  const char* available_with;  // a kernel that needs the same of the processor
};

constexpr Emulation kEmulations[] = {
    {"gemm_amx", AmxGemm, EmulatedAmxGemm, "gemm_avx512"},
    {"gemm_amx_bf16", AmxBf16Gemm, EmulatedAmxBf16Gemm, "gemm_avx512"},
    {"gemm_avxvnni", AvxVnniGemm, EmulatedAvxVnniGemm, "gemm_avx512_vnni"},
};

/// What the registry called select_real with, or as good as.
Codes CodesOf(const Emulation& emulation, const Kernel& real) {
  const GemmFunction gemm = static_cast<const CpuGemm*>(real.launch)->blocks32.gemm;
  for (Codes codes : {Codes::kTable, Codes::kHalves, Codes::kSigned})
    if (emulation.select_real(real.format->bits, codes, 32).gemm == gemm) return codes;
  return Codes::kE4M3;
}

bool (*AvailableOf(const std::string& stem))() {
  for (const Kernel* kernel : Kernels())
    if (kernel->stem == stem) return kernel->available;
  return nullptr;
}

}  // namespace

void RegisterEmulatedKernels(int priority) {
  static std::deque<CpuGemm> launches;
  for (const Kernel* real : Kernels()) {
    for (const Emulation& emulation : kEmulations) {
      if (real->stem != emulation.real) continue;
      const Codes codes = CodesOf(emulation, *real);
      const int bits = real->format->bits;
      CpuGemm& launch = launches.emplace_back(*static_cast<const CpuGemm*>(real->launch));
      launch.blocks32 = emulation.select(bits, codes, 32);
      launch.blocks16 = emulation.select(bits, codes, 16);
      Kernel kernel = *real;
      kernel.stem.replace(0, std::string("gemm").size(), "emulated");
      kernel.name = kernel.stem + "." + real->format->name;
      kernel.priority += priority;
      kernel.available = AvailableOf(emulation.available_with);
      kernel.launch = &launch;
      RegisterKernel(kernel);
    }
  }
}

}  // namespace qmoe_plugin
