#include "ops/cpu/layout.h"

#include <cstring>

#include "ops/pack.h"
#include "ops/pack_loops.h"

namespace qmoe_plugin::cpu {
namespace {

/// Dwords of one 32-bit or two 16-bit codes.
void EncodePlain(int code_bytes, const uint8_t* codes, int64_t k_padded, uint8_t* out) {
  const int64_t row_bytes = k_padded * code_bytes;
  for (int64_t at = 0; at < row_bytes; at += 4)
    for (int n = 0; n < kPanelRows; ++n, out += 4) std::memcpy(out, codes + n * row_bytes + at, 4);
}

const bool registered = RegisterTileLayout({.layout = Layout::kCpuPanel16,
                                            .k_multiple = 32,
                                            .tile_row = [](int i, bool) { return i; },
                                            .slot = [](int tile_row) { return tile_row; },
                                            .encode_tile = EncodePanel});

}  // namespace

void EncodePanel(const Format& format, const uint8_t* codes, int64_t k_padded, uint8_t* out) {
  if (format.plain()) return EncodePlain(format.code_bytes(), codes, k_padded, out);
  GetPackLoops().panel(codes, k_padded, format.bits, out);
}

}  // namespace qmoe_plugin::cpu
