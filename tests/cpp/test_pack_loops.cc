// The loops of packing, all of them against plain conversions, and the memory that they write to.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "ops/cpu/layout.h"
#include "ops/host_memory.h"
#include "ops/pack_loops.h"
#include "tests/cpp/expect.h"

namespace qmoe_plugin {
namespace {

std::mt19937 random_bits(1);

/// float16 numbers, the floats half-way between them, and what lies beside those.
std::vector<float> FloatsAroundHalves() {
  std::vector<float> values;
  for (uint32_t half = 0; half < 0x7c00; ++half) {
    const float value = HalfToFloat(uint16_t(half)), next = HalfToFloat(uint16_t(half + 1));
    const float middle = half + 1 < 0x7c00 ? (value + next) / 2 : 65520.0f;
    for (float x : {value, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)}) {
      values.push_back(x);
      values.push_back(-x);
    }
  }
  for (float x : {1e-30f, 7e4f, 3e38f, std::numeric_limits<float>::denorm_min()})
    values.push_back(x);
  return values;
}

void TestHalves(const PackLoops& loops) {
  const std::vector<float> values = FloatsAroundHalves();
  const int64_t count = int64_t(values.size());
  std::vector<uint16_t> halves(16 * values.size(), 0xdead);
  loops.store_half(values.data(), 1.0f, count, halves.data());
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT(halves[16 * i] == FloatToHalf(values[i]), "float16 of ", values[i]);
    const bool exact = HalfToFloat(FloatToHalf(values[i])) == values[i];
    EXPECT(loops.fit_half(&values[i], 1.0f, 1) == exact, "whether float16 holds ", values[i]);
    const float smaller = HalfToFloat(FloatToHalf(values[i])) * 0x1p-11f;
    if (std::abs(values[i]) < 6e4f)
      EXPECT(loops.fit_smaller_half(&values[i], 1.0f, 0x1p-11f, 1) ==
                 (HalfToFloat(FloatToHalf(smaller)) == smaller),
             "whether float16 holds 2^-11 times float16 of ", values[i]);
    EXPECT(halves[16 * i + 1] == 0xdead, "only every 16th place is written");
  }
  std::vector<float> exact(37, 0.75f);
  EXPECT(loops.fit_half(exact.data(), 2.0f, 37), "1.5 fits, 37 times");
  for (size_t i = 0; i < exact.size(); ++i) {
    exact[i] = 1 + 0x1p-11f;
    EXPECT(!loops.fit_half(exact.data(), 2.0f, 37), "one number that does not fit, at ", i);
    exact[i] = 0.75f;
  }
}

void TestToFloat(const PackLoops& loops) {
  std::vector<uint16_t> words(65536);
  std::vector<uint8_t> bytes(256);
  for (size_t i = 0; i < words.size(); ++i) words[i] = uint16_t(i);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i);
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3,
                      DType::kFloat8E8M0}) {
    const bool is_byte = SizeOf(dtype) == 1;
    const void* const data = is_byte ? static_cast<const void*>(bytes.data()) : words.data();
    const size_t count = is_byte ? 256 : 65536 * 2 / SizeOf(dtype);
    std::vector<float> out(count);
    loops.to_float(data, dtype, int64_t(count), out.data());
    for (size_t i = 0; i < count; ++i) {
      const float expected = LoadFloat(data, dtype, i);
      EXPECT(std::isnan(expected)
                 ? std::isnan(out[i])
                 : std::bit_cast<uint32_t>(out[i]) == std::bit_cast<uint32_t>(expected),
             Name(dtype), " number ", i, " is ", out[i], ", not ", expected);
    }
  }
}

void TestNumbers(const PackLoops& loops) {
  std::vector<float> x(45);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i == 31 ? -9.0f : 0.1f * float(i);
  EXPECT(loops.largest(x.data(), 45) == 9.0f, "the largest magnitude");
  EXPECT(loops.largest(x.data(), 0) == 0.0f, "of nothing");
  EXPECT(loops.multiply(2.0f, 45, x.data()) && x[31] == -18.0f, "finite products");
  for (float bad : {std::numeric_limits<float>::infinity(), std::nanf(""), 2e38f})
    for (size_t i = 0; i < x.size(); ++i) {
      std::vector<float> copy = x;
      copy[i] = bad;
      EXPECT(!loops.multiply(2.0f, 45, copy.data()), bad, " at ", i);
    }
  std::vector<uint8_t> codes(45, 3);
  EXPECT(!loops.contains(codes.data(), 45, 0x7f), "a code that is not there");
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = 0x7f;
    EXPECT(loops.contains(codes.data(), 45, 0x7f), "a code at ", i);
    codes[i] = 0x7e;
  }
}

void TestCodes(const PackLoops& loops) {
  for (int bits : {2, 4, 8}) {
    for (int64_t k : {32, 64, 96, 2880}) {
      std::vector<uint8_t> codes(16 * k), panel(16 * k * bits / 8), packed(16 * k * bits / 8);
      for (size_t i = 0; i < codes.size(); ++i) {
        codes[i] = uint8_t(random_bits() & ((1u << bits) - 1));
        packed[i * bits / 8] |= uint8_t(codes[i] << (i * bits % 8));
      }
      if (bits < 8) {
        std::vector<uint8_t> unpacked(codes.size());
        loops.unpack(packed.data(), int64_t(packed.size()), bits, unpacked.data());
        EXPECT(unpacked == codes, bits, " bits unpacked, ", k, " columns");
      }
      loops.panel(codes.data(), k, bits, panel.data());
      const int in_dword = 32 / bits;
      int wrong = 0;
      for (int64_t i = 0; i < 16 * k; ++i) {
        const int64_t n = i / k, at = i % k;
        uint32_t dword;
        std::memcpy(&dword, &panel[size_t(at / in_dword * 64 + n * 4)], sizeof dword);
        wrong += (dword >> cpu::CodeShift(bits, int(at % in_dword)) & ((1u << bits) - 1)) !=
                 codes[size_t(i)];
      }
      EXPECT(wrong == 0, wrong, " wrong codes in a panel of ", bits, " bits and ", k, " columns");
    }
  }
}

void TestMemory() {
  constexpr size_t kHugePage = size_t(2) << 20;
  for (size_t bytes : {size_t(1), size_t(100), kHugePage - 1, kHugePage, 3 * kHugePage + 5}) {
    const std::shared_ptr<uint8_t> memory = AllocateHost(bytes);
    const size_t alignment = bytes < kHugePage ? 64 : kHugePage;
    EXPECT(reinterpret_cast<uintptr_t>(memory.get()) % alignment == 0, bytes, " bytes aligned");
    std::memset(memory.get(), 1, bytes);
  }
  try {
    AllocateHost(~size_t(0));
    EXPECT(false, "more memory than can be counted was granted");
  } catch (const Error& error) {
    EXPECT(std::strstr(error.what(), "out of memory"), error.what());
  }
}

int Main() {
  std::vector<const PackLoops*> all{&kPackLoopsPortable};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) all.push_back(&kPackLoopsAvx2);
#endif
  for (const PackLoops* loops : all) {
    TestHalves(*loops);
    TestToFloat(*loops);
    TestNumbers(*loops);
    TestCodes(*loops);
  }
  TestMemory();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

}  // namespace
}  // namespace qmoe_plugin

int main() { return qmoe_plugin::Main(); }
