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

}  // namespace

Projection PackedProjection(const char* name, const TensorView& bytes, const Format& format,
                            int64_t block_size) {
  const PackedHeader header = ReadHeader(name, bytes);
  const std::string packed = Text(header.FormatName(), header.block_size);
  const std::string wanted = Text(format.name, block_size);
  QMOE_REQUIRE(packed == wanted, name, " weights were packed as ", packed,
               ", but the node's attributes say ", wanted,
               "; give the attributes of the node that was packed, or prepack the original model "
               "again");
  Projection p;
  p.name = name;
  p.format = &format;
  p.experts = header.experts;
  p.n = header.rows;
  p.k = header.k;
  p.block_size = block_size;
  p.packed = bytes;
  return p;
}

}  // namespace qmoe_plugin::ort
