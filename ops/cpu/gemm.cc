#include "ops/cpu/gemm.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <cmath>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <string>
#include <string_view>

#include "ops/common/float_codes.h"
#include "ops/error.h"
#include "ops/registry.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qmoe_plugin {
namespace {

#if defined(__x86_64__)
enum Level { kReference, kAvx2, kAvxVnni, kAvx512, kAmx };
constexpr const char* kLevelNames[] = {"reference", "avx2", "avxvnni", "avx512", "amx"};
#elif defined(__aarch64__)
enum Level { kReference, kNeon, kNeonDotprod, kNeonI8mm };
constexpr const char* kLevelNames[] = {"reference", "neon", "neon_dotprod", "neon_i8mm"};
#else
enum Level { kReference };
constexpr const char* kLevelNames[] = {"reference"};
#endif

/// The highest level that QMOE_PLUGIN_CPU_ISA allows; read each time, so that a test may change it.
Level AllowedLevel() {
  constexpr int kLevels = std::size(kLevelNames);
  const char* value = std::getenv("QMOE_PLUGIN_CPU_ISA");
  const std::string_view name = value == nullptr ? "" : value;
  if (name.empty()) return Level(kLevels - 1);
  std::string names;
  for (int i = 0; i < kLevels; ++i) {
    if (name == kLevelNames[i]) return Level(i);
    names += Concat(i == 0 ? "" : i + 1 == kLevels ? " and " : ", ", kLevelNames[i]);
  }
  FailInvalid("environment variable QMOE_PLUGIN_CPU_ISA is '", name, "'; allowed are ", names,
              ", or leave it unset for the best level");
}

#if defined(__x86_64__)
bool Avx2Available() {
  return AllowedLevel() >= kAvx2 && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool AvxVnniAvailable() {
  return AllowedLevel() >= kAvxVnni && __builtin_cpu_supports("avxvnni") && Avx2Available();
}

bool Avx512Available() {
  return AllowedLevel() >= kAvx512 && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && Avx2Available();
}

bool VnniAvailable() { return Avx512Available() && __builtin_cpu_supports("avx512vnni"); }

/// Asks Linux for tiles, which are 8 KB more of each thread's state. The answer holds for all threads
/// of the process, those that there are already too. Kernels before 5.16 say no, and so does one that
/// finds a thread with a signal stack that is too small.
bool TilesPermitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

/// That the processor supports amx-bf16 means that XCR0 has both states of tiles, too.
bool AmxAvailable() {
  return AllowedLevel() >= kAmx && Avx512Available() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && TilesPermitted();
}

/// vdpbf16ps has twice the rate of float32 multiply-adds on AMD's processors, but half of it on
/// Intel's, where the exact kernels are faster.
bool Bf16Available() {
  return Avx512Available() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
}
#elif defined(__aarch64__)
bool NeonAvailable() { return AllowedLevel() >= kNeon; }

#if defined(__linux__)
bool DotprodAvailable() {
  return AllowedLevel() >= kNeonDotprod && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}

/// Its kernel does few rows by dot products.
bool I8mmAvailable() {
  return AllowedLevel() >= kNeonI8mm && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0 &&
         DotprodAvailable();
}
#else  // not known here how to ask
bool DotprodAvailable() { return false; }
bool I8mmAvailable() { return false; }
#endif
#endif

/// The reference runs at every level, but a wrong level must not go unnoticed.
bool ReferenceAvailable() { return AllowedLevel() >= kReference; }

std::string Refuse(const GemmProblem& problem) {
  if (problem.block_size % 16 != 0)
    return Concat("needs a block size that is a multiple of 16, not ", problem.block_size);
  return {};
}

/// Rounding a row of activations takes about as long as the products of 32 columns of y save.
constexpr int64_t kMinRoundingColumns = 64;

/// Refuse, and what would not be faster.
std::string RefuseNarrow(const GemmProblem& problem) {
  if (problem.n < kMinRoundingColumns)
    return Concat("is not faster than kernels that read activations as they are below ",
                  kMinRoundingColumns, " output features, here ", problem.n);
  return Refuse(problem);
}

#if defined(__x86_64__)
/// RefuseNarrow, and too few rows to fill tiles; 0 are any number.
std::string RefuseFew(const GemmProblem& problem) {
  const int64_t fewest = FewestTileRows(problem.accuracy_level);
  if (problem.rows > 0 && problem.rows < fewest * problem.experts)
    return Concat("is for ", fewest, " rows an expert and more, on average, not ", problem.rows,
                  problem.experts == 1 ? "" : Concat(" for ", problem.experts, " experts"));
  return RefuseNarrow(problem);
}
#endif

/// What asks for more exact sums, and what kNext refuses.
template <AccuracyLevel kLevel, std::string (*kNext)(const GemmProblem&) = RefuseNarrow>
std::string RefuseRounding(const GemmProblem& problem) {
  if (problem.accuracy_level < kLevel)
    return Concat("rounds activations, which only accuracy_level ", kLevel,
                  kLevel < 4 ? " or more" : "", " allows, not ", problem.accuracy_level);
  return kNext(problem);
}

Codes CodesOf(const Format& format) {
  if (format.plain_type == DType::kFloat16) return Codes::kFloat16;
  if (format.plain_type == DType::kBFloat16) return Codes::kBFloat16;
  if (format.plain_type == DType::kFloat32) return Codes::kFloat32;
  const int codes = 1 << format.bits;
  bool is_signed = true, is_e4m3 = format.bits == 8, is_halves = !format.codebook;
  for (int code = 0; code < codes; ++code) {
    const float value = format.centered[code];
    is_signed &= value == float(code - codes / 2);
    is_e4m3 &= (code & 0x7f) == 0x7f || value == DecodeE4M3(uint32_t(code));
    is_halves &= std::fabs(value) <= 8 && 2 * value == std::rint(2 * value);
  }
  if (is_signed) return Codes::kSigned;
  return is_halves ? Codes::kHalves : is_e4m3 ? Codes::kE4M3 : Codes::kTable;
}

/// The values of the codes, repeated for those under 8 bits; zeros for plain formats.
void FillTable(const Format& format, float* table) {
  for (int i = 0; i < 256; ++i)
    table[i] = format.plain() ? 0.0f : format.centered[i & ((1 << format.bits) - 1)];
}

/// A family of kernels: one for each format that it takes.
struct Family {
  const char* stem;
  const CpuIsa* isa;
  GemmKernel (*select)(const CpuIsa& isa, int bits, Codes codes, int block);
  int priority;
  bool (*available)();
  std::string (*refuse)(const GemmProblem&);
  const char* arithmetic;  // for the support table
};

/// The exact kernels that read float32, which take any block size alike.
GemmKernel SelectExact(const CpuIsa& isa, int bits, Codes codes, int) {
  return {isa.gemm(bits, codes), kFloatsOf32, nullptr};
}

#if defined(__x86_64__) || defined(__aarch64__)
/// The kernels that read activations as they store them.
template <GemmKernel (*kSelect)(int, Codes, int)>
GemmKernel SelectStoring(const CpuIsa&, int bits, Codes codes, int block) {
  return kSelect(bits, codes, block);
}
#endif

void Register(const Family& family) {
  static std::deque<CpuGemm> launches;  // live as long as the registry; a deque never moves them
  for (const Format* format : Formats()) {
    const auto select = [&](int block) {
      return family.select(*family.isa, format->bits, CodesOf(*format), block);
    };
    if (select(32).gemm == nullptr) continue;
    CpuGemm& launch = launches.emplace_back(CpuGemm{family.isa, select(32), select(16), {}});
    FillTable(*format, launch.table);
    RegisterKernel(
        {.name = std::string(family.stem) + "." + format->name,
         .stem = family.stem,
         .format = format,
         .device = DeviceType::kCpu,
         .dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
         .layout = Layout::kCpuPanel16,
         .priority = family.priority,
         .limits = std::string("per channel, or blocks of a multiple of 16; ") + family.arithmetic,
         .refuse = family.refuse,
         .available = family.available,
         .launch = &launch});
  }
}

}  // namespace

void RegisterCpuKernels() {
  constexpr const char* kExact = "float32 arithmetic";
  Register({"gemm_reference", &kCpuReference, SelectExact, 0, ReferenceAvailable, Refuse, kExact});
#if defined(__x86_64__) || defined(__aarch64__)
  constexpr const char* kInt8 = "accuracy_level 4, activations rounded to int8";
#endif
#if defined(__x86_64__)
  Register({"gemm_avx2", &kCpuAvx2, SelectExact, 10, Avx2Available, Refuse, kExact});
  Register({"gemm_avx2_int8", &kCpuAvx2, SelectStoring<Avx2Int8Gemm>, 25, Avx2Available,
            RefuseRounding<4>, kInt8});
  Register({"gemm_avx512", &kCpuAvx512, SelectExact, 20, Avx512Available, Refuse, kExact});
  Register({"gemm_avx512_bf16", &kCpuAvx512, SelectStoring<Avx512Bf16Gemm>, 30, Bf16Available,
            RefuseRounding<3>, "accuracy_level 3 or 4, activations rounded to bfloat16"});
  Register({"gemm_avx512_vnni", &kCpuAvx512, SelectStoring<Avx512VnniGemm>, 40, VnniAvailable,
            RefuseRounding<4>, kInt8});
  Register({"gemm_avxvnni", &kCpuAvx2, SelectStoring<AvxVnniGemm>, 35, AvxVnniAvailable,
            RefuseRounding<4>, kInt8});
  Register({"gemm_amx", &kCpuAvx512, SelectStoring<AmxGemm>, 22, AmxAvailable, RefuseFew,
            "activations in three bfloat16 parts, float32 sums; many rows"});
  Register({"gemm_amx_bf16", &kCpuAvx512, SelectStoring<AmxBf16Gemm>, 50, AmxAvailable,
            RefuseRounding<3, RefuseFew>,
            "accuracy_level 3 or 4, activations and weights rounded to bfloat16; many rows"});
#elif defined(__aarch64__)
  Register({"gemm_neon", &kCpuNeon, SelectExact, 10, NeonAvailable, Refuse, kExact});
  Register({"gemm_neon_dotprod", &kCpuNeon, SelectStoring<NeonDotprodGemm>, 20, DotprodAvailable,
            RefuseRounding<4>, kInt8});
  Register({"gemm_neon_i8mm", &kCpuNeon, SelectStoring<NeonI8mmGemm>, 30, I8mmAvailable,
            RefuseRounding<4>, kInt8});
#endif
}

}  // namespace qmoe_plugin
