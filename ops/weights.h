// Quantised weights as a model stores them, read row by row.
//
// Every layout that a model may use (raw rows, gate and up stored apart or interleaved, a permuted
// K) ends here: packers see one thing only, row `r` of expert `e` as plain codes with its scales
// and zero offsets. See ops/pack.h for the other end.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/dtype.h"
#include "ops/formats/format.h"
#include "ops/stored_layout.h"

namespace qmoe_plugin {

/// A tensor in host memory that somebody else owns. `data` null means that the input was left out.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kUndefined;
  std::vector<int64_t> shape;

  /// True if the tensor was given; an empty tensor (a zero dimension) counts as given.
  bool present = false;

  int64_t elements() const;
  size_t bytes() const { return size_t(elements()) * SizeOf(dtype); }
  std::string Describe() const;  // "uint8[4, 64, 32]"
};

/// One quantised matrix per expert, y = x W^T + bias, as com.microsoft QMoE and MatMulNBits store it.
/// G = ceil(K / block_size) blocks along K, or one per row when block_size is 0 (per channel);
/// R = ceil(N / scale_rows) rows of scales.
struct Projection {
  std::string name;  // "fc1", for messages
  const Format* format = nullptr;
  int64_t experts = 1;     // E; 1 for MatMulNBits
  int64_t n = 0, k = 0;    // output and input features
  int64_t block_size = 0;  // codes along K that share a scale; 0 = the whole row
  int64_t scale_rows = 1;  // rows that share a scale; block_size for square blocks
  StoredLayout layout = StoredLayout::kRaw;
  /// uint8 (or float8e4m3fn for 8-bit floats) [E, N, ceil(stored K * bits / 8)], stored K = K or G * block_size;
  /// for other layouts than kRaw also [E, K, N * bits / 8]. Plain formats: the weights, [E, N, K].
  TensorView codes = {};
  /// Float types, float8e4m3fn or float8e8m0 (or uint8, read as float8e8m0, if scales_are_e8m0), [E, R, G] or, if G is
  /// 1, [E, R]. May be absent where there is a global scale. Plain formats have none of either.
  TensorView scales = {};
  bool scales_are_e8m0 = false;
  /// Optional, integer formats: uint8 packed along the last axis, [E, N, ceil(G * bits / 8)], per channel
  /// [E, ceil(N * bits / 8)]; or one value a block, [E, N, G] in uint8 or a float type.
  TensorView zero_points = {};
  TensorView bias = {};          // optional, float types [E, N]
  TensorView global_scale = {};  // optional, float32 [E]: factor on all scales of an expert
  TensorView sum_scale = {};     // optional, float32 [E]: factor on y, but not on the bias
  TensorView group_index = {};   // optional, int32 [K]: block of each k (g_idx of MatMulNBits)
  TensorView codebook = {};  // formats with a codebook: float types [2^bits], value of each code
  TensorView packed = {};    // instead of all others: uint8 [bytes], see ops/pack_source.h

  DType ScaleType() const { return scales_are_e8m0 ? DType::kFloat8E8M0 : scales.dtype; }
  int64_t groups() const { return block_size ? (k + block_size - 1) / block_size : 1; }
};

/// How the rows of a gated fc1 are stored. Readers always deliver gate_0, up_0, gate_1, up_1, ...
enum class RowOrder {
  kAsStored,     // not gated, or already interleaved (swiglu_fusion 1)
  kHalves,       // all gates, then all ups (swiglu_fusion 2)
  kTwoMatrices,  // gates in one projection, ups in another (fc1 and fc3)
};

/// Reads packed rows out of one projection, or out of a gate and an up projection of the same shape
/// and format. Construction checks shapes, types and sizes and throws Error; reading checks values
/// (scales and zero points must be finite). Thread-safe once constructed. The tensors' memory must
/// outlive the reader.
class RowReader {
 public:
  RowReader(Projection projection, RowOrder order = RowOrder::kAsStored);
  RowReader(Projection gate, Projection up);  // RowOrder::kTwoMatrices

  const Format& format() const { return *parts_[0].format; }
  int64_t experts() const { return parts_[0].experts; }
  int64_t rows() const;  // rows of the packed matrix, gates and ups together
  int64_t k() const {
    return packed_k_;
  }  // K, or the reordered and padded K when there is a k_order()
  int64_t block_size() const { return parts_[0].block_size; }  // 0 = per channel
  int64_t groups() const { return groups_; }
  bool has_zero_points() const;
  bool has_integer_zero_points() const;  // some, and none may be a fraction
  /// Whether bfloat16 holds the values of the codes and the block scales (by their type, none is read), so that it may multiply them.
  bool has_short_factors() const;
  bool has_bias() const;

  /// For a permuted K: position in the activation row of each packed k, -1 for padding. Empty if K
  /// is as stored.
  const std::vector<int32_t>& k_order() const { return k_order_; }

  /// Codes of one row, [k()] of Format::code_bytes() each.
  void Codes(int64_t expert, int64_t row, uint8_t* out) const { Codes(expert, row, 1, &out); }
  /// Codes of rows row, row + 1, ... into out[0], out[1], ...: at most kMaxRows, which is faster.
  void Codes(int64_t expert, int64_t row, int count, uint8_t* const* out) const;
  static constexpr int kMaxRows = 16;
  /// Scales of one row, [groups()].
  void Scales(int64_t expert, int64_t row, float* out) const;
  /// default_zero_point - zero_point of one row, [groups()]; zeros if there are no zero points.
  void ZeroOffsets(int64_t expert, int64_t row, float* out) const;
  float Bias(int64_t expert, int64_t row) const;
  /// Value of each code, [2^bits], for formats with a codebook; else empty.
  const std::vector<float>& codebook() const { return codebook_; }
  /// Factor on the sums of an expert, 1 unless Projection::sum_scale is given.
  float SumScale(int64_t expert) const;
  bool has_sum_scale() const { return parts_[0].sum_scale.present; }

 private:
  struct Place {  // where a packed row is stored
    const Projection* part;
    int64_t row;
  };
  enum class ZeroPoints {
    kNone,
    kPackedByRow,
    kPackedAcrossRows,
    kOneByte,
    kFloat
  };  // how they are stored

  Place Locate(int64_t row) const;
  void BuildKOrder();
  void ReadCodebook();
  void ReorderCodes(uint8_t* codes) const;
  void RefuseNaN(int64_t expert, int64_t row, const uint8_t* codes) const;
  void RefuseInfinite(int64_t expert, int64_t row, const uint8_t* codes) const;
  static ZeroPoints ZeroPointsOf(const Projection& projection);

  std::vector<Projection> parts_;
  std::vector<ZeroPoints> zero_points_;  // one a part
  RowOrder order_;
  int64_t packed_k_ = 0;
  int64_t groups_ = 0;
  std::vector<float> codebook_;
  std::vector<int32_t> k_order_;      // see k_order()
  std::vector<int32_t> group_order_;  // stored block of each packed block; empty = identity
};

}  // namespace qmoe_plugin
