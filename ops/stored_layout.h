// The ways in which models store the codes of a quantised matrix, each read row by row.
//
//   kRaw        [E, N, K * bits / 8]   codes along K, lowest bits first: the schema's layout
//   kKMajor     [E, K, N * bits / 8]   codes along N, lowest bits first: FP4 of onnxruntime's CUDA exports
//   kFpAIntB    a permutation of the unsigned codes made for onnxruntime's SM80 kernels (weights_prepacked 1 and,
//               in CUDA exports, -1; MatMulNBits weight_prepacked 1). Its shape is [E, K, N * bits / 8] in QMoE and
//               the raw one in MatMulNBits.
//   kFpAIntB90  the same for SM90, without interleaved columns (MatMulNBits weight_prepacked 2)
//
// kFpAIntB, one matrix [N, K] as 32-bit words of 32 / bits codes each. Codes of one output column lie in runs of K tiles:
//   1. k is permuted in tiles of T = 32 (4 bits) or 16 (8 bits): place (T/4) q + r holds k = 2q + 8 (r / 2) + r % 2
//   2. words of `interleave` = 4 (4 bits) or 2 (8 bits) neighbouring columns alternate, 64 k of each column at a time
//   3. inside a word even places come first: nibbles hold 0 2 4 6 1 3 5 7, bytes 0 2 1 3
#pragma once

#include <cstdint>
#include <string>

namespace qmoe_plugin {

enum class StoredLayout { kRaw, kKMajor, kFpAIntB, kFpAIntB90 };

const char* Name(StoredLayout layout);

/// Why the layout cannot hold a matrix [n, k] of codes with so many bits; empty if it can.
std::string RefuseStoredLayout(StoredLayout layout, int64_t n, int64_t k, int bits);

/// Codes [k] of rows row, row + 1, ... (`count` of them), one byte each (16-bit and 32-bit ones, which
/// are always raw: 2 and 4 bytes), into out[0], out[1], ...
/// `matrix` is the expert's first byte, `row_bytes` the length of a raw row. Several rows at once
/// because neighbours share cache lines where a row's own codes lie apart.
void ReadStoredRows(StoredLayout layout, const uint8_t* matrix, int64_t n, int64_t k, int bits,
                    int64_t row_bytes, int64_t row, int count, uint8_t* const* out);

}  // namespace qmoe_plugin
