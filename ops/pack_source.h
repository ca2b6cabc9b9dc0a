// Where the packed weights of a GEMM come from: a model's rows, packed now, or bytes that were
// packed before (qmoe_plugin.prepack), which are used as they are.
//
// Bytes are self-describing (ops/packed_weights.h): they say their format, sizes and layout, and
// everything of the model is in them, biases included. On the CPU they are used in place where they
// are 64-byte aligned, and must then outlive the op; on CUDA they are uploaded in one copy.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "ops/device.h"
#include "ops/pack.h"
#include "ops/packed_weights.h"
#include "ops/weights.h"

namespace qmoe_plugin {

/// How weights are packed for a device.
struct PackTarget {
  Layout layout;
  ScalePolicy policy;
  int sm;  // of the device, 0 for the CPU; only for messages, as all GPUs read the same
};

/// What the kernels of a device read beside activations of this type. Throws Error for GPUs that
/// none runs on.
PackTarget TargetOf(const Device& device, DType activations);

/// Memory for the packed bytes of the projection `name`, to be written in full.
using AllocatePacked = std::function<void*(const std::string& name, size_t bytes)>;

/// Whether an op on this device goes on reading the projection's own bytes after it was made.
bool StaysInUse(const Projection& projection, const Device& device);

class PackSource {
 public:
  /// The tensors of `reader` must outlive this.
  explicit PackSource(RowReader reader) : reader_(std::move(reader)) {}
  /// Projection::packed. Checks that nothing else is given, and the bytes. Throws Error.
  explicit PackSource(const Projection& packed);

  const Format& format() const;
  int64_t experts() const;
  int64_t rows() const;  // gates and ups together
  int64_t k() const;
  int64_t block_size() const;  // 0 = per channel
  bool has_zero_points() const;
  /// Whether a scale of the activations is in the row scales (Projection::sum_scale).
  bool has_sum_scale() const;
  /// RowReader::k_order().
  const std::vector<int32_t>& k_order() const;

  /// The header that the packed weights will have. Throws Error if they are packed already, but for
  /// another layout, activation or type of scales.
  PackedHeader Plan(bool gated, const PackTarget& target) const;
  /// Writes the packed weights: piece by piece, or the given bytes at once.
  void Write(const PackedHeader& header, const PackSink& sink) const;
  /// In host memory: packed now, or the given bytes themselves.
  PackedWeights ToHost(bool gated, const PackTarget& target) const;
  /// Packs into memory that the caller provides, for a later PackSource(Projection). Throws Error if
  /// the weights are packed already, or have a g_idx.
  void Prepack(const std::string& name, bool gated, const PackTarget& target,
               const AllocatePacked& allocate) const;

 private:
  std::string name_;
  std::optional<RowReader> reader_;  // else packed_
  PackedWeights packed_;
};

}  // namespace qmoe_plugin
