#include "ops/pack_source.h"

#include <cstring>

#include "ops/error.h"

namespace qmoe_plugin {
namespace {

/// What to do about bytes that this target cannot use.
std::string PackAgain(const PackTarget& target) {
  const std::string sm = target.sm ? std::to_string(target.sm) : "None";
  return "; prepack the original model for it: qmoe_plugin.prepack(model, output, sm=" + sm + ")";
}

}  // namespace

PackTarget TargetOf(const Device& device, DType activations) {
  if (device.type == DeviceType::kCpu)
    return {Layout::kCpuPanel16, ScalePolicy::kFloat16IfExact, 0};
  QMOE_REQUIRE(device.sm >= 80, "GPUs of sm_", device.sm,
               " are not supported; the CUDA kernels run from sm_80 on");
  // float16 holds scales with up to 11 significant bits exactly, and 16-bit products could use no
  // more.
  return {Layout::kCudaTile16x64,
          activations == DType::kFloat32 ? ScalePolicy::kFloat32 : ScalePolicy::kFloat16,
          device.sm};
}

bool StaysInUse(const Projection& projection, const Device& device) {
  const TensorView& packed = projection.packed;
  return packed.present && device.type == DeviceType::kCpu && LoadsInPlace(packed.data);
}

PackSource::PackSource(const Projection& p) : name_(p.name) {
  for (const TensorView* other :
       {&p.codes, &p.scales, &p.zero_points, &p.bias, &p.global_scale, &p.group_index, &p.codebook})
    QMOE_REQUIRE(!other->present, p.name, " is packed, which has everything in it, but ",
                 other->Describe(),
                 " is given as well; leave scales, zero points, bias and global scale out");
  QMOE_REQUIRE(p.packed.dtype == DType::kUint8 && p.packed.shape.size() == 1, p.name,
               " packed weights are ", p.packed.Describe(), "; they must be uint8[bytes]");
  try {
    packed_ = LoadPacked(p.packed.data, p.packed.bytes());
  } catch (const Error& error) {
    throw Error(error.code(), Concat(p.name, ": ", error.what()));
  }
}

const Format& PackSource::format() const {
  return reader_ ? reader_->format() : GetFormat(packed_.header.FormatName());
}

int64_t PackSource::experts() const {
  return reader_ ? reader_->experts() : packed_.header.experts;
}

int64_t PackSource::rows() const { return reader_ ? reader_->rows() : packed_.header.rows; }

int64_t PackSource::k() const { return reader_ ? reader_->k() : packed_.header.k; }

int64_t PackSource::block_size() const {
  return reader_ ? reader_->block_size() : packed_.header.block_size;
}

bool PackSource::has_zero_points() const {
  return reader_ ? reader_->has_zero_points()
                 : (packed_.header.flags & PackedHeader::kZeroOffsets) != 0;
}

bool PackSource::has_sum_scale() const {
  return reader_ ? reader_->has_sum_scale() : (packed_.header.flags & PackedHeader::kSumScale) != 0;
}

const std::vector<int32_t>& PackSource::k_order() const {
  static const std::vector<int32_t> as_stored;
  return reader_ ? reader_->k_order() : as_stored;
}

PackedHeader PackSource::Plan(bool gated, const PackTarget& target) const {
  if (reader_) return PlanPack(*reader_, gated, target.layout, target.policy);
  const PackedHeader& header = packed_.header;
  const std::string device = target.sm ? Concat("a GPU of sm_", target.sm) : "the CPU";
  QMOE_REQUIRE(header.layout == target.layout, name_, " weights were packed for ",
               DeviceOf(header.layout), " (layout ", Name(header.layout),
               "); this session runs on ", device, " (layout ", Name(target.layout), ")",
               PackAgain(target));
  QMOE_REQUIRE(packed_.gated() == gated, name_, " weights were packed for ",
               gated ? "an activation without gates" : "a gated activation",
               ", which that of this node is not", PackAgain(target));
  const bool wants_half = target.policy == ScalePolicy::kFloat16;
  const bool any = target.policy == ScalePolicy::kFloat16IfExact;
  QMOE_REQUIRE(any || wants_half == (packed_.scale_dtype() == DType::kFloat16), name_,
               " weights were packed for ", wants_half ? "float32" : "16-bit",
               " activations; this node has ", wants_half ? "16-bit" : "float32", " ones",
               PackAgain(target));
  return header;
}

void PackSource::Write(const PackedHeader& header, const PackSink& sink) const {
  if (reader_) return Pack(*reader_, header, sink);
  sink.write(0, packed_.memory.get(), header.bytes);
}

PackedWeights PackSource::ToHost(bool gated, const PackTarget& target) const {
  if (reader_) return PackToHost(*reader_, gated, target.layout, target.policy);
  Plan(gated, target);
  return packed_;
}

void PackSource::Prepack(const std::string& name, bool gated, const PackTarget& target,
                         const AllocatePacked& allocate) const {
  QMOE_REQUIRE(reader_, name, " is packed already");
  QMOE_REQUIRE(k_order().empty(), name,
               " has a g_idx, whose order of K packed weights cannot hold; leave it as it is");
  const PackedHeader header = Plan(gated, target);
  void* base = allocate(name, header.bytes);
  std::memset(base, 0, header.bytes);  // the gaps between sections belong to the result
  Write(header, {.base = static_cast<uint8_t*>(base), .write = {}});
}

}  // namespace qmoe_plugin
