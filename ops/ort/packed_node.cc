#include "ops/ort/packed_node.h"

#include "ops/error.h"
#include "ops/packed_weights.h"

namespace qmoe_plugin::ort {
namespace {

std::string Text(const std::string& format, int64_t block_size) {
  return Concat(format, block_size ? Concat(" block ", block_size) : " per channel");
}

PackedHeader ReadHeader(const char* name, const TensorView& bytes) {
  QMOE_REQUIRE(bytes.present && bytes.dtype == DType::kUint8 && bytes.shape.size() == 1, name,
               " weights are ", bytes.present ? bytes.Describe() : "missing",
               "; packed ones, as weights_layout says, are uint8[bytes]");
  try {
    return ReadPackedHeader(bytes.data, bytes.bytes());
  } catch (const Error& error) {
    throw Error(error.code(), Concat(name, ": ", error.what()));
  }
}

Projection TakeHeader(const char* name, const TensorView& bytes, const PackedHeader& header) {
  Projection p;
  p.name = name;
  p.format = &GetFormat(header.FormatName());
  p.experts = header.experts;
  p.n = header.rows;
  p.k = header.k;
  p.block_size = header.block_size;
  p.packed = bytes;
  return p;
}

}  // namespace

bool IsPacked(const std::string& weights_layout, const char* otherwise) {
  QMOE_REQUIRE(weights_layout == kPackedLayout || weights_layout.empty(), "weights_layout is \"",
               weights_layout, "\"; allowed is \"packed\", for weights packed before. ", otherwise);
  return weights_layout == kPackedLayout;
}

Projection PackedProjection(const char* name, const TensorView& bytes, const Format& format,
                            int64_t block_size) {
  const PackedHeader header = ReadHeader(name, bytes);
  const std::string packed = Text(header.FormatName(), header.block_size);
  const std::string wanted = Text(format.name, block_size);
  QMOE_REQUIRE(packed == wanted, name, " weights were packed as ", packed,
               ", but the node's attributes say ", wanted,
               "; give the attributes of the node that was packed, or prepack the original model "
               "again");
  return TakeHeader(name, bytes, header);
}

Projection PackedPlainProjection(const char* name, const TensorView& bytes) {
  const PackedHeader header = ReadHeader(name, bytes);
  const Projection p = TakeHeader(name, bytes, header);
  QMOE_REQUIRE(
      p.format->plain(), name, " weights were packed as ",
      Text(header.FormatName(), header.block_size),
      ", but the weights of a MoE are float32, float16 or bfloat16; quantised ones are for "
      "QMoE");
  return p;
}

}  // namespace qmoe_plugin::ort
