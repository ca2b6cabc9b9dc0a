// The rates that bound the CPU kernels on this machine, as JSON: how fast memory is read, and how many
// operations each instruction does. bench_cpu.py compiles and runs it beside every measurement.
//
//   cpu_rates THREADS wall|cpu
//
// "cpu" measures by the CPU time of the calling thread and takes one thread. A rate is the best of
// several rounds: what the machine can do, not what its neighbours leave.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

double Seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

struct Machine {
  int threads;
  clockid_t clock;

  /// Work a second, if each thread's `body(thread)` does `work`: the best of `rounds`.
  double Best(int rounds, double work, const std::function<void(int)>& body) const {
    double best = 0;
    for (int round = 0; round < rounds; ++round) {
      const double start = Seconds(clock);
      std::vector<std::thread> others;
      for (int i = 1; i < threads; ++i) others.emplace_back(body, i);
      body(0);
      for (std::thread& other : others) other.join();
      best = std::max(best, work * threads / (Seconds(clock) - start));
    }
    return best;
  }
};

/// A value that the compiler must compute.
template <class T>
void Keep(const T& value) {
  asm volatile("" : : "m"(value) : "memory");
}

typedef int64_t Vector __attribute__((vector_size(64)));

#ifdef __x86_64__
#define QMOE_TARGET(isa) __attribute__((target(isa)))
#else
#define QMOE_TARGET(isa)
#endif

QMOE_TARGET("avx2") int64_t Sum(const Vector* data, size_t count) {
  Vector sums[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8)
    for (size_t j = 0; j < 8; ++j) {
      __builtin_prefetch(data + i + j + 64);
      sums[j] ^= data[i + j];
    }
  for (size_t j = 1; j < 8; ++j) sums[0] ^= sums[j];
  int64_t total = 0;
  for (int j = 0; j < 8; ++j) total ^= sums[0][j];
  return total;
}

/// GB/s from memory: 256 MB a thread, in huge pages, as packed weights are.
double ReadBandwidth(const Machine& machine) {
  constexpr size_t kBytes = size_t(256) << 20, kAlign = size_t(2) << 20;
  std::vector<uint8_t*> blocks;
  for (int i = 0; i < machine.threads; ++i) {
    auto* const block = static_cast<uint8_t*>(std::aligned_alloc(kAlign, kBytes));
    if (block == nullptr) {
      std::fprintf(stderr, "cpu_rates: out of memory\n");
      std::exit(1);
    }
    madvise(block, kBytes, MADV_HUGEPAGE);
    std::memset(block, i + 1, kBytes);
    blocks.push_back(block);
  }
  const double rate = machine.Best(40, double(kBytes), [&](int i) {
    Keep(Sum(reinterpret_cast<const Vector*>(blocks[size_t(i)]), kBytes / sizeof(Vector)));
  });
  for (uint8_t* block : blocks) std::free(block);
  return rate / 1e9;
}

#ifdef __x86_64__
constexpr int64_t kSteps = 2'000'000;

// 12 sums, which hides the latency of 4 to 5 clocks at two instructions a clock.
#define QMOE_TIMES_12(step) \
  step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)

#define QMOE_RATE(name, isa, type, zero, one, operation) \
  QMOE_TARGET(isa) void name(int) {                      \
    type sums[12];                                       \
    for (type& sum : sums) sum = zero;                   \
    type a = one, b = one;                               \
    for (int64_t i = 0; i < kSteps; ++i) {               \
      asm volatile("" : "+v"(a), "+v"(b));               \
      QMOE_TIMES_12(operation)                           \
    }                                                    \
    for (type& sum : sums) Keep(sum);                    \
  }
#define QMOE_FMA256(j) sums[j] = _mm256_fmadd_ps(a, b, sums[j]);
#define QMOE_FMA512(j) sums[j] = _mm512_fmadd_ps(a, b, sums[j]);
#define QMOE_MADDUBS(j) \
  sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), b));
#define QMOE_AVXVNNI(j) sums[j] = _mm256_dpbusd_avx_epi32(sums[j], a, b);
#define QMOE_VNNI(j) sums[j] = _mm512_dpbusd_epi32(sums[j], a, b);
#define QMOE_BF16(j) sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)a, (__m512bh)b);

QMOE_RATE(Fma256, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_set1_ps(1e-3f), QMOE_FMA256)
QMOE_RATE(Fma512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_set1_ps(1e-3f), QMOE_FMA512)
QMOE_RATE(Maddubs256, "avx2", __m256i, _mm256_setzero_si256(), _mm256_set1_epi8(1), QMOE_MADDUBS)
QMOE_RATE(AvxVnni256, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), _mm256_set1_epi32(1),
          QMOE_AVXVNNI)
QMOE_RATE(Vnni512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_set1_epi32(1),
          QMOE_VNNI)

QMOE_TARGET("avx512f,avx512bf16") void Bf16Dot512(int) {
  __m512 sums[12];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  __m512i a = _mm512_set1_epi32(0x3c003c00), b = a;
  for (int64_t i = 0; i < kSteps; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));
    QMOE_TIMES_12(QMOE_BF16)
  }
  for (__m512& sum : sums) Keep(sum);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// Four independent tiles of sums; the operands are zeros, which are as fast as anything.
template <class Step>
void Tiles(const Step& step) {
  static const TileConfig config;
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  asm volatile(
      "tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3\n"
      "tilezero %tmm4\n tilezero %tmm5");
  for (int64_t i = 0; i < kSteps / 20; ++i) step();
  asm volatile("tilerelease");
}

void AmxBf16(int) {
  Tiles([] {
    asm volatile(
        "tdpbf16ps %tmm5, %tmm4, %tmm0\n tdpbf16ps %tmm5, %tmm4, %tmm1\n"
        "tdpbf16ps %tmm5, %tmm4, %tmm2\n tdpbf16ps %tmm5, %tmm4, %tmm3");
  });
}

void AmxInt8(int) {
  Tiles([] {
    asm volatile(
        "tdpbusd %tmm5, %tmm4, %tmm0\n tdpbusd %tmm5, %tmm4, %tmm1\n"
        "tdpbusd %tmm5, %tmm4, %tmm2\n tdpbusd %tmm5, %tmm4, %tmm3");
  });
}

/// Whether the kernel lets this process use tile registers.
bool TilesPermitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const std::string clock = argc == 3 ? argv[2] : "";
  const int threads = argc == 3 ? std::atoi(argv[1]) : 0;
  if (threads < 1 || (clock != "wall" && (clock != "cpu" || threads != 1))) {
    std::fprintf(stderr, "usage: cpu_rates THREADS wall, or cpu_rates 1 cpu\n");
    return 2;
  }
  const Machine machine{threads, clock == "cpu" ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC};
  std::printf("{\"read_gb_per_s\": %.2f", ReadBandwidth(machine));
#ifdef __x86_64__
  const auto report = [&](const char* name, double operations, void (*body)(int)) {
    std::printf(", \"%s\": %.1f", name, machine.Best(5, operations, body) / 1e9);
  };
  constexpr double kSums = 12.0 * kSteps, kTileSums = 4.0 * (kSteps / 20);
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f");
  // Operations are multiplications and additions of the dot product, 10^9 a second.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    report("fma_avx2", 16 * kSums, Fma256);
    report("int8_avx2", 64 * kSums, Maddubs256);
  }
  if (__builtin_cpu_supports("avxvnni")) report("int8_avxvnni", 64 * kSums, AvxVnni256);
  if (avx512) report("fma_avx512", 32 * kSums, Fma512);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) report("bf16_avx512", 64 * kSums, Bf16Dot512);
  if (avx512 && __builtin_cpu_supports("avx512vnni")) report("int8_avx512", 128 * kSums, Vnni512);
  if (__builtin_cpu_supports("amx-bf16") && TilesPermitted())
    report("bf16_amx", 2.0 * 16 * 16 * 32 * kTileSums, AmxBf16);
  if (__builtin_cpu_supports("amx-int8") && TilesPermitted())
    report("int8_amx", 2.0 * 16 * 16 * 64 * kTileSums, AmxInt8);
#endif
  std::printf("}\n");
}
