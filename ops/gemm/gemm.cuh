// What pipelines (ops/qmoe/qmoe.cu, ops/matmul_nbits/matmul_nbits.cu) and the CUDA GEMM kernels
// beside this file know of each other.
//
// All kernels compute the same, for each row tile (an expert e and some rows r) and each feature n:
//
//   w[e, n, k] = (centered(code) + zero_offset) * block_scale
//   acc[r, n]  = sum over k of x[x_rows[r], k] * w[e, n, k]           in float32
//   v[r, n]    = acc * row_scale + bias
//   y[r, n]    = activation(v[r, n]); gated: activation(gate, up) of two n; rounded once
//
// Rows are sorted by expert. Row tiles never mix experts and hold at most tile_rows rows. The list
// of them is made on the device (ops/qmoe/permute.cu), so grids are sized for the worst case and
// blocks beyond the list's end return at once.
//
// A kernel is a header ops/gemm/<stem>.cuh with a struct <stem>::Gemm<F>, F being the format, whose
// static members RegisterCudaGemm reads; the build makes one translation unit of it for each
// format. docs/adding-a-kernel.md tells the rest.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "ops/common/cuda_host.h"
#include "ops/error.h"
#include "ops/gemm/layout.h"
#include "ops/qmoe/route.cuh"
#include "ops/registry.h"

namespace qmoe_plugin {

/// Rows of one expert that a block works on together.
struct RowTile {
  int expert;
  int row_begin;  // in the sorted rows
  int row_count;  // 1 to tile_rows
};

/// One launch. Passed to kernels by value.
struct CudaGemmArgs {
  GemmStage stage;
  DType dtype;  // of x and y

  // Packed weights [E, n, k] in kCudaTile16x64, see ops/packed_weights.h.
  const uint8_t* codes;
  const void* block_scales;  // null = per channel
  const void* zero_offsets;  // null = none
  bool integer_offsets;      // all of them are integers
  bool short_factors;        // values of codes and block scales are exact in bfloat16
  bool coarse_scales;        // block scales are multiples of 2^-13
  const float* row_scales;
  const float* bias;      // null = none
  const float* codebook;  // [2^bits], formats with a codebook only
  int64_t tile_bytes;     // codes of one row tile
  int n, k;
  int row_tiles;     // of the weights: ceil(n / 16)
  int weight_tiles;  // row tiles of all experts
  int block_shift;   // k >> block_shift is the block; 31 = per channel
  int groups;        // blocks a row in block_scales and zero_offsets; 1 = per channel
  bool gated;

  // Activations [*, k]. Values beyond k are never read.
  const void* x;
  int64_t x_stride;   // elements
  const int* x_rows;  // [rows] row of x of each sorted row; null = the row itself
  // How a kernel with `quantizes_x` quantises the rows that it reads, see ops/qmoe/activation_quant.h.
  ActivationQuant x_quant;
  const float* x_scales;  // [experts], for kFp8

  // Row tiles; null = one expert, `rows` rows.
  const RowTile* tiles;
  const int* tile_count;  // on the device
  int64_t max_tiles;      // the grid is made for so many
  int64_t rows;
  int tile_rows;
  int*
      next_item;  // on the device, 0: persistent blocks count the work items that they take; null = they take turns

  // Output [rows, n], or [rows, n / 2] for gated weights.
  void* y;
  int64_t y_stride;
  bool y_is_float;  // y is float32 whatever dtype is
  ActivationParams activation;

  // The device.
  int sm, multiprocessors;
  Overlap overlap;  // with the kernel before it, for kernels that can
  /// With overlap: the row tiles are written by the kernel right before, not by an earlier one.
  bool tiles_are_new;
};

/// The most that a launch which routes by itself takes.
inline constexpr int kFusedTokens = 8, kFusedRows = 64, kFusedExperts = 256;

/// What the first block of fc1 found out, for all blocks of fc2; in global memory.
struct SharedRoute {
  int slots;  // experts that have rows; 0 = not known yet
  RowTile tiles[kFusedRows];
};

/// A launch that routes by itself: there are no row tiles, x_rows is ignored.
struct FusedRoute {
  bool enabled;
  bool x_is_tokens;     // x has a row a token (fc1), not a row a sorted row (fc2)
  RouteArgs route;      // expert_ids is ignored; scales are written unless null
  int* sorted_row;      // [T, k] written unless null
  SharedRoute* shared;  // fc1 writes it, fc2 looks there before it routes; null = neither does
  // For one token fc2 adds up what the experts give; nothing of scales, sorted_row or unpermute is needed then.
  int* arrivals;      // [row tiles of fc2] units of each that are done; fc1 clears them
  int arrival_count;  // so many to clear; 0 in fc2
  void* output;       // [N] of fc2; null in fc1 and for more tokens
};

/// Registry entry: what Kernel::launch points to. All thread-safe.
struct CudaGemm {
  /// Rows of a tile that suit the problem; goes into CudaGemmArgs and into the row tile list.
  int (*tile_rows)(const GemmProblem&);
  /// Called at construction with the device current, for the activation type that will be launched
  /// and the device's SM: loads the kernels (PrepareKernel).
  void (*prepare)(DType, int sm);
  void (*launch)(const CudaGemmArgs&, cudaStream_t);
  /// The same, routing by itself; null for kernels that cannot.
  void (*launch_routed)(const CudaGemmArgs&, const FusedRoute&, cudaStream_t);
  /// Wants the rows of x in the order of their experts rather than gather them itself.
  bool wants_sorted_x;
  /// Follows CudaGemmArgs::x_quant; other kernels get rows that are quantised.
  bool quantizes_x;
};

/// Upper bound of the number of row tiles.
constexpr int64_t MaxRowTiles(int64_t rows, int64_t experts, int tile_rows) {
  const int64_t used = rows < experts ? rows : experts;  // experts that can have any rows
  return (rows + used * (tile_rows - 1)) / tile_rows;
}

/// Rows of x that an expert gets on average, of those that can have any.
constexpr int64_t RowsPerExpert(const GemmProblem& p) {
  const int64_t used = p.rows < p.experts ? p.rows : p.experts;
  return used > 0 ? p.rows / used : 0;
}

/// Most shared memory of a block, bytes.
constexpr int SharedLimit(int sm) {
  return (sm == 80 || sm == 87 ? 163 : sm >= 90 && sm < 120 ? 227 : 99) << 10;
}

/// Why kCudaTile16x64 cannot hold the problem's weights so that a fragment has one scale a row;
/// empty if it can.
inline std::string RefuseBlockSize(const GemmProblem& p) {
  if (p.block_size == 0 || (p.block_size >= 16 && std::has_single_bit(uint64_t(p.block_size))))
    return {};
  return Concat("block_size ", p.block_size,
                "; it takes powers of two from 16 on, and per channel");
}

/// Whether there is a kernel for the format: unless it says kTakesFormat = false.
template <class Gemm>
consteval bool TakesFormat() {
  if constexpr (requires { Gemm::kTakesFormat; })
    return Gemm::kTakesFormat;
  else
    return true;
}

template <class F, class Gemm>
Kernel DescribeCudaGemm(const char* stem) {
  static CudaGemm gemm{&Gemm::TileRows, &Gemm::Prepare, &Gemm::Launch, nullptr, false, false};
  if constexpr (requires { &Gemm::LaunchRouted; }) gemm.launch_routed = &Gemm::LaunchRouted;
  if constexpr (requires { Gemm::kWantsSortedX; }) gemm.wants_sorted_x = Gemm::kWantsSortedX;
  if constexpr (requires { Gemm::kQuantizesX; }) gemm.quantizes_x = Gemm::kQuantizesX;
  Kernel kernel;
  kernel.name = std::string(stem) + "." + F::kName;
  kernel.stem = stem;
  kernel.format = FindFormat(F::kName);
  kernel.device = DeviceType::kCuda;
  kernel.min_sm = Gemm::kMinSm;
  kernel.max_sm = Gemm::kMaxSm;
  kernel.dtypes = Gemm::DTypes();
  kernel.layout = Layout::kCudaTile16x64;
  kernel.priority = Gemm::kPriority;
  kernel.limits = Gemm::kLimits;
  kernel.refuse = &Gemm::Refuse;
  kernel.launch = &gemm;
  return kernel;
}

template <class F, class Gemm>
bool RegisterCudaGemm(const char* stem) {
  RegisterFormat(DescribeFormat<F>());  // this may run before the format's own translation unit
  if constexpr (TakesFormat<Gemm>())
    return RegisterKernel(DescribeCudaGemm<F, Gemm>(stem));
  else
    return false;
}

/// For kernels without instructions of one generation only.
inline constexpr int kFirstSm = 80, kLastSm = 129;

/// In a generated translation unit, after the kernel's and the format's header.
#define QMOE_REGISTER_CUDA_GEMM(kernel, format)                       \
  [[maybe_unused]] static const bool registered_##kernel##_##format = \
      ::qmoe_plugin::RegisterCudaGemm<                                \
          ::qmoe_plugin::formats::format,                             \
          ::qmoe_plugin::kernel::Gemm<::qmoe_plugin::formats::format>>(#kernel)

}  // namespace qmoe_plugin
