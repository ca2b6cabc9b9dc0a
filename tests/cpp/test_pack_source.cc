// Weights that were packed before: the same results as from the model's rows, in place where they
// may be, and a clear refusal of bytes that are not whole or not for this node.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "ops/error.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "ops/pack_source.h"
#include "ops/qmoe/qmoe.h"
#include "tests/cpp/expect.h"

namespace qmoe_plugin {
namespace {

void ExpectError(const std::function<void()>& body, const char* part) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT(std::strstr(error.what(), part), "'", error.what(), "' should contain '", part, "'");
    return;
  }
  EXPECT(false, "no error where '", part, "' was expected");
}

std::mt19937 rng(11);

struct codebook : formats::FormatBase<codebook, 4> {
  static constexpr char kName[] = "test_book";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr bool kCodebook = true;
  static float Decode(uint32_t) { return 0; }
};
[[maybe_unused]] const bool registered = RegisterFormat(DescribeFormat<codebook>());

/// A random projection that owns its tensors.
struct Weights {
  std::vector<uint8_t> codes, zero_points;
  std::vector<float> scales, bias;
  Projection projection;

  Weights(const char* name, int64_t experts, int64_t n, int64_t k, int64_t block)
      : codes(size_t(experts * n * k / 2)),
        zero_points(size_t(experts * n * ((k / block + 1) / 2))),
        scales(size_t(experts * n * k / block)),
        bias(size_t(experts * n)) {
    for (uint8_t& code : codes) code = uint8_t(rng());
    for (uint8_t& zero_point : zero_points) zero_point = uint8_t(rng());
    for (float& scale : scales) scale = float(rng() % 1000) / 8192 - 0.05f;
    for (float& b : bias) b = float(rng() % 100) / 50 - 1;
    projection = {
        .name = name,
        .format = &GetFormat("int4"),
        .experts = experts,
        .n = n,
        .k = k,
        .block_size = block,
        .codes = {codes.data(), DType::kUint8, {experts, n, k / 2}, true},
        .scales = {scales.data(), DType::kFloat32, {experts, n, k / block}, true},
        .zero_points = {zero_points.data(), DType::kUint8, {experts, n, (k / block + 1) / 2}, true},
        .bias = {bias.data(), DType::kFloat32, {experts, n}, true}};
  }
};

/// Packed bytes at an address that is `offset` beyond a multiple of 64.
struct Bytes {
  std::vector<uint8_t> memory;
  uint8_t* begin = nullptr;
  size_t size = 0;

  uint8_t* Allocate(size_t bytes, size_t offset) {
    size = bytes;
    memory.resize(size + 128);
    const size_t address = reinterpret_cast<uintptr_t>(memory.data());
    return begin = memory.data() + (64 - address % 64) + offset;
  }

  Projection Packed(const char* name) const {
    return {.name = name, .packed = {begin, DType::kUint8, {int64_t(size)}, true}};
  }
  PackedHeader& header() { return *reinterpret_cast<PackedHeader*>(begin); }
};

Bytes PackedBytes(const RowReader& reader, bool gated, const PackTarget& target) {
  Bytes bytes;
  PackSource(reader).Prepack(
      "W", gated, target, [&](const std::string&, size_t size) { return bytes.Allocate(size, 0); });
  return bytes;
}

const Device kCpuDevice{}, kGpu{DeviceType::kCuda, 0, 90};
const PackTarget kCpu = TargetOf(kCpuDevice, DType::kFloat32),
                 kCuda16 = TargetOf(kGpu, DType::kBFloat16),
                 kCuda32 = TargetOf(kGpu, DType::kFloat32);

ExecutionContext Context(std::vector<uint8_t>& workspace) {
  ExecutionContext context;
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace.data());
  context.workspace = reinterpret_cast<void*>((address + 63) / 64 * 64);
  context.parallel_for = [](size_t total, const std::function<void(size_t)>& fn) {
    for (size_t i = 0; i < total; ++i) fn(i);
  };
  return context;
}

struct Moe {
  static constexpr int64_t kExperts = 4, kHidden = 96, kInter = 80, kTokens = 19;
  MoeConfig config{.hidden_size = kHidden,
                   .inter_size = kInter,
                   .experts = kExperts,
                   .topk = 2,
                   .activation = {.type = Activation::kSwiglu},
                   .fc1_act_scales = {},
                   .fc2_act_scales = {}};
  Weights gate{"fc1", kExperts, kInter, kHidden, 16}, up{"fc3", kExperts, kInter, kHidden, 16},
      down{"fc2", kExperts, kHidden, kInter, 16};
  MoeWeights weights{gate.projection, RowOrder::kTwoMatrices, down.projection, up.projection};

  std::vector<float> Run(const MoeWeights& w) const {
    std::mt19937 random(5);
    std::vector<float> x(kTokens * kHidden), logits(kTokens * kExperts), y(x.size());
    for (float& v : x) v = float(random() % 200) / 100 - 1;
    for (float& v : logits) v = float(random() % 1000) / 300;
    const auto op = MakeQMoe(Device{}, config, w);
    std::vector<uint8_t> workspace(op->WorkspaceBytes(kTokens) + 64);
    MoeTensors tensors;
    tensors.tokens = kTokens;
    tensors.input = x.data();
    tensors.router_probs = logits.data();
    tensors.output = y.data();
    op->Run(tensors, Context(workspace));
    return y;
  }
};

void TestMoe() {
  Moe moe;
  const std::vector<float> expected = moe.Run(moe.weights);
  for (const ActivationQuant quant : {ActivationQuant::kNone, ActivationQuant::kFp8}) {
    if (quant == ActivationQuant::kFp8) {
      moe.config.activation_quant = quant;
      moe.config.fc1_act_scales = moe.config.fc2_act_scales = {0.01f, 0.02f, 0.01f, 0.03f};
    }
    const std::vector<float> direct = moe.Run(moe.weights);
    EXPECT((direct == expected) == (quant == ActivationQuant::kNone), "quantising changes y");
    for (const size_t offset : {0, 4}) {
      Bytes fc1, fc2;
      PrepackQMoe(kCpuDevice, moe.config, moe.weights, [&](const std::string& name, size_t size) {
        return (name == "fc1" ? fc1 : fc2).Allocate(size, offset);
      });
      const MoeWeights packed{fc1.Packed("fc1"), RowOrder::kAsStored, fc2.Packed("fc2"), {}};
      EXPECT(moe.Run(packed) == direct, "packed weights give another y, offset ", offset);
      const PackSource source(packed.fc1);
      const bool in_place = source.ToHost(true, kCpu).memory.get() == fc1.begin;
      EXPECT(in_place == (offset == 0), "in place ", in_place, " at offset ", offset);
      EXPECT(StaysInUse(packed.fc1, kCpuDevice) == in_place, "in use at offset ", offset);
      EXPECT(!StaysInUse(packed.fc1, kGpu) && !StaysInUse(moe.weights.fc1, kCpuDevice),
             "uploaded or packed bytes are not in use");
      ExpectError([&] { PrepackQMoe(kCpuDevice, moe.config, packed, nullptr); },
                  "fc1 is packed already");
      if (quant == ActivationQuant::kNone) continue;
      Moe plain;
      ExpectError([&] { plain.Run(packed); }, "fc1 weights were packed with activation scales");
    }
  }
}

void TestMatMul() {
  const Weights w("B", 1, 48, 64, 32);
  const MatMulConfig config{.n = 48, .k = 64};
  Projection bare = w.projection;
  Bytes bytes;
  PrepackMatMulNBits(kCpuDevice, config, bare, [&](const std::string& name, size_t size) {
    EXPECT(name == "B", name);
    return bytes.Allocate(size, 0);
  });
  std::vector<float> a(3 * 64, 0.5f), y[2];
  for (int i = 0; i < 2; ++i) {
    const auto op = MakeMatMulNBits(Device{}, config, i ? bytes.Packed("B") : bare);
    std::vector<uint8_t> workspace(op->WorkspaceBytes(3) + 64);
    y[i].resize(3 * 48);
    op->Run({.m = 3, .a = a.data(), .y = y[i].data()}, Context(workspace));
  }
  EXPECT(y[0] == y[1], "packed B gives another Y");
  ExpectError([&] { MakeMatMulNBits(Device{}, {.n = 48, .k = 32}, bytes.Packed("B")); },
              "B holds 1 x 48 x 64 weights; this node needs 1 x 48 x 32");
  Projection both = bytes.Packed("B");
  both.bias = bare.bias;
  ExpectError([&] { PackSource{both}; }, "float32[1, 48] is given as well");
  // A g_idx: its order is not in the bytes.
  std::vector<int32_t> group(64);
  for (int k = 0; k < 64; ++k) group[size_t(k)] = k % 2;
  bare.group_index = {group.data(), DType::kInt32, {64}, true};
  ExpectError([&] { PrepackMatMulNBits(kCpuDevice, config, bare, nullptr); }, "B has a g_idx");
  const RowReader reader(bare);
  Bytes permuted;
  const PackedHeader header = PlanPack(reader, false, kCpu.layout, kCpu.policy);
  Pack(reader, header, {.base = permuted.Allocate(header.bytes, 0), .write = {}});
  ExpectError([&] { PackSource{permuted.Packed("B")}; }, "packed with a g_idx");
}

/// The model's values of the codes are in the bytes, wherever they were packed.
void TestCodebook() {
  Weights w("B", 1, 48, 64, 32);
  const std::vector<float> values{-1.0f, -0.7f, -0.5f, -0.4f, -0.3f, -0.2f, -0.1f, 0.0f,
                                  0.1f,  0.2f,  0.3f,  0.4f,  0.5f,  0.6f,  0.7f,  1.1f};
  Projection& p = w.projection;
  p.format = &GetFormat("test_book");
  ExpectError([&] { RowReader{p}; }, "B has zero points");
  p.zero_points = {};
  ExpectError([&] { RowReader{p}; }, "B has no codebook, but format test_book needs one");
  p.codebook = {values.data(), DType::kFloat32, {15}, true};
  ExpectError([&] { RowReader{p}; }, "must be a float tensor of shape [16]");
  p.codebook.shape = {16};
  for (const PackTarget& target : {kCpu, kCuda16}) {
    const Bytes whole = PackedBytes(RowReader(p), false, target);
    const PackedWeights packed = LoadPacked(whole.begin, whole.size);
    EXPECT(packed.codebook() && std::equal(values.begin(), values.end(), packed.codebook()),
           "codebook in the bytes");
    // The same by pieces, as for an upload.
    std::vector<uint8_t> pieces(whole.size);
    Pack(RowReader(p), packed.header,
         {.base = nullptr, .write = [&](size_t at, const uint8_t* from, size_t size) {
            std::memcpy(&pieces[at], from, size);
          }});
    EXPECT(std::memcmp(&pieces[packed.shape.codes], packed.codes(),
                       size_t(packed.shape.row_tiles * packed.shape.tile_bytes)) == 0 &&
               std::memcmp(&pieces[packed.shape.codebook], values.data(), 64) == 0,
           "pieces differ from the whole");
  }
  Projection other = p;
  other.format = &GetFormat("int4");
  ExpectError([&] { RowReader{other}; }, "a codebook, which format int4 does not take");
  std::vector<float> bad = values;
  bad[3] = std::numeric_limits<float>::infinity();
  p.codebook.data = bad.data();
  ExpectError([&] { RowReader{p}; }, "gives code 3 the value inf");
  bad[3] = 0.25f;
  other = p;
  other.codebook.data = values.data();
  ExpectError([&] { RowReader(other, p); }, "another codebook than the gates");
}

/// One upload for CUDA, and refusals that need no GPU.
void TestForCuda() {
  const Weights w("fc2", 3, 40, 64, 32);
  const RowReader reader(w.projection);
  const Bytes bytes = PackedBytes(reader, false, kCuda16);
  const PackSource source(bytes.Packed("fc2"));
  int writes = 0;
  const auto write = [&](size_t offset, const uint8_t* from, size_t size) {
    ++writes;
    EXPECT(offset == 0 && from == bytes.begin && size == bytes.size, "offset ", offset);
  };
  source.Write(source.Plan(false, kCuda16), {.base = nullptr, .write = write});
  EXPECT(writes == 1, writes, " writes");
  EXPECT(source.format().name == std::string("int4") && source.experts() == 3 &&
             source.rows() == 40 && source.k() == 64 && source.block_size() == 32 &&
             source.has_zero_points() && !source.has_sum_scale(),
         "sizes of packed weights");
  ExpectError([&] { source.Plan(false, kCpu); },
              "fc2 weights were packed for CUDA GPUs from sm_80");
  ExpectError([&] { source.Plan(true, kCuda16); }, "without gates");
  ExpectError([&] { source.Plan(false, kCuda32); },
              "packed for 16-bit activations; this node has float32");
  const Bytes wide = PackedBytes(reader, true, kCuda32);
  const PackSource wide_source(wide.Packed("fc2"));
  ExpectError([&] { wide_source.Plan(true, kCuda16); },
              "packed for float32 activations; this node has 16-bit");
  ExpectError([&] { wide_source.Plan(false, kCuda32); }, "gated activation");
  ExpectError([] { TargetOf({DeviceType::kCuda, 0, 75}, DType::kFloat16); }, "GPUs of sm_75");
}

/// Writes the checksum that belongs to a header: FNV-1a with the checksum zeroed.
void Seal(PackedHeader& header) {
  header.checksum = 0;
  uint64_t hash = 0xcbf29ce484222325u;
  for (size_t i = 0; i < sizeof header; ++i)
    hash = (hash ^ reinterpret_cast<const uint8_t*>(&header)[i]) * 0x100000001b3u;
  header.checksum = hash;
}

/// What is no section, and was in the memory before, does not get into files.
void TestGaps() {
  const Weights w("B", 1, 40, 64, 32);
  const RowReader reader(w.projection);
  std::vector<uint8_t> results[2];
  for (const uint8_t before : {0x00, 0xaa}) {
    PackSource(reader).Prepack("B", false, kCpu, [&](const std::string&, size_t size) {
      results[before != 0].assign(size, before);
      return results[before != 0].data();
    });
  }
  EXPECT(results[0] == results[1], "packed bytes depend on what was there before");
}

void TestDamage() {
  const Weights w("fc1", 2, 32, 64, 16);
  const RowReader reader(w.projection);
  const auto expect = [&](const std::function<void(Bytes&)>& damage, const char* part) {
    Bytes bytes = PackedBytes(reader, false, kCpu);
    damage(bytes);
    ExpectError([&] { PackSource{bytes.Packed("fc1")}; }, part);
  };
  expect([](Bytes& b) { b.begin[0] ^= 1; }, "fc1: these bytes are not packed weights");
  expect([](Bytes& b) { b.header().version = 7; }, "are of version 7; this build reads version 1");
  expect([](Bytes& b) { b.header().rows = 33; }, "damaged");
  expect([](Bytes& b) { b.header().checksum ^= 1; }, "damaged");
  expect([](Bytes& b) { b.size -= 256; }, "but their header stands for");
  expect([](Bytes& b) { b.size = 40; }, "less than their header");
  expect(
      [](Bytes& b) {
        b.header().encoding ^= 1;
        Seal(b.header());
      },
      "made by another qmoe_plugin, which lays out int4 as cpu_panel16 in another way");
  // Sealed again by somebody who means harm: sizes that would overflow.
  expect(
      [](Bytes& b) {
        b.header().experts = b.header().rows = b.header().k = 0xffffffff;
        SealHeader(b.header());
      },
      "makes no sense");
  expect(
      [](Bytes& b) {
        b.header().block_size = 24;
        SealHeader(b.header());
      },
      "makes no sense");
  expect(
      [](Bytes& b) {
        b.header().experts += 1;
        SealHeader(b.header());
      },
      "the file is damaged");
}

int Main() {
  TestMoe();
  TestMatMul();
  TestCodebook();
  TestForCuda();
  TestGaps();
  TestDamage();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

}  // namespace
}  // namespace qmoe_plugin

int main() { return qmoe_plugin::Main(); }
