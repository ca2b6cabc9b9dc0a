// What every GEMM kernel does with a 16 x 64 tile of packed weights: find its row tile, load a
// lane's codes and scales, decode them, and finish the sums.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/common/ptx.cuh"
#include "ops/common/types.cuh"
#include "ops/gemm/gemm.cuh"
#include "ops/gemm/layout.h"

namespace qmoe_plugin {

/// Row tile `index` of the launch; false if there are not so many.
__device__ inline bool GetRowTile(const CudaGemmArgs& args, int64_t index, RowTile* tile) {
  if (args.tiles != nullptr) {
    if (index >= *args.tile_count) return false;
    *tile = args.tiles[index];
    return true;
  }
  const int64_t begin = index * args.tile_rows;
  *tile = {0, int(begin), int(min(int64_t(args.tile_rows), args.rows - begin))};
  return true;
}

/// Row of x that sorted row `row` reads.
template <class T>
__device__ const T* XRow(const CudaGemmArgs& args, int row) {
  const int64_t index = args.x_rows != nullptr ? args.x_rows[row] : row;
  return static_cast<const T*>(args.x) + index * args.x_stride;
}

/// Codes of weight row tile `row_tile`, k tile 0.
__device__ inline const uint8_t* TileCodes(const CudaGemmArgs& args, int expert, int row_tile) {
  return args.codes + (int64_t(expert) * args.row_tiles + row_tile) * args.tile_bytes;
}

/// First scale (and zero offset) of a weight row tile, [groups, 16], counted in elements.
__device__ inline int64_t TileScales(const CudaGemmArgs& args, int expert, int row_tile) {
  return (int64_t(expert) * args.row_tiles + row_tile) * args.groups * kTileRows;
}

/// The values of a format with a codebook, one a lane; nothing for all other formats. A look-up is a
/// shuffle, so whole warps must take part.
template <class F>
class Codebook {
 public:
  __device__ explicit Codebook(const CudaGemmArgs&) {}
};

template <class F>
  requires F::kCodebook
class Codebook<F> {
 public:
  __device__ explicit Codebook(const CudaGemmArgs& args)
      : value_(args.codebook[threadIdx.x % (1 << F::kBits)]) {}
  __device__ float operator[](uint32_t code) const {
    return __shfl_sync(0xffffffff, value_, int(code));
  }

 private:
  float value_;
};

/// Centered values of a fragment of F::kFragmentWords words, two of each row: (g, k..), (g+8, k..), (g, k+8..), (g+8, k+8..).
template <class F, class T2>
__device__ void DequantWords(const Codebook<F>& codebook, const uint32_t* words, T2 (&a)[4]) {
  if constexpr (F::kCodebook) {
    static_assert(F::kBits == 4 && std::is_same_v<T2, float2>);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = words[0] >> (8 * i);
      a[i] = make_float2(codebook[pair & 15], codebook[(pair >> 4) & 15]);
    }
  } else {
    F::DequantFragment(words, a);
  }
}

/// Zero offsets: none; integers, which 16 bits add to codes exactly; or any, or none where 16 bits do not hold values and scales.
enum class Offsets { kNone, kIntegers, kAny };

/// DequantWords with an integer zero offset each of rows g and g + 8, exactly.
template <class F, class T2>
__device__ void DequantWords(const Codebook<F>& codebook, const uint32_t* words, T2 offset,
                             T2 (&a)[4]) {
  if constexpr (requires { F::OffsetFragment(words, offset, a); }) {
    F::OffsetFragment(words, offset, a);
  } else {
    DequantWords<F>(codebook, words, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __hadd2(a[i], Both(offset, i % 2));
  }
}

/// The codes of one lane in one tile, as words.
template <class F>
struct LaneCodes {
  uint32_t words[F::kBits];

  __device__ void LoadGlobal(const uint8_t* tile, int lane) {
    if constexpr (F::kBits == 2) {
      Set(0, LoadStreaming8(tile + lane * 8));
    } else {
#pragma unroll
      for (int c = 0; c < F::kBits / 4; ++c)
        Set(4 * c, LoadStreaming16(tile + c * ChunkBytes(F::kBits) + lane * 16));
    }
  }

  __device__ void LoadShared(const char* tile, int lane) {
    if constexpr (F::kBits == 2) {
      Set(0, *reinterpret_cast<const uint2*>(tile + lane * 8));
    } else {
#pragma unroll
      for (int c = 0; c < F::kBits / 4; ++c)
        Set(4 * c, *reinterpret_cast<const uint4*>(tile + c * ChunkBytes(F::kBits) + lane * 16));
    }
  }

  /// The same by the tile's address.
  __device__ void LoadShared(uint32_t tile, int lane) {
    if constexpr (F::kBits == 2) {
      Set(0, LoadShared8(tile + lane * 8));
    } else {
#pragma unroll
      for (int c = 0; c < F::kBits / 4; ++c)
        Set(4 * c, LoadShared16(tile + c * ChunkBytes(F::kBits) + lane * 16));
    }
  }

  /// DequantWords of fragment j; offset: none, or of rows g and g + 8.
  template <class T2, class... Offset>
  __device__ void Dequant(const Codebook<F>& codebook, int j, T2 (&a)[4], Offset... offset) const {
    if constexpr (F::kBits == 2) {
      const uint32_t half_word = words[j / 2] >> (16 * (j % 2));
      DequantWords<F>(codebook, &half_word, offset..., a);
    } else {
      DequantWords<F>(codebook, words + j * F::kFragmentWords, offset..., a);
    }
  }

 private:
  __device__ void Set(int i, uint2 v) { words[i] = v.x, words[i + 1] = v.y; }
  __device__ void Set(int i, uint4 v) {
    words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
  }
};

/// The codes of one lane in one fragment of a tile, as words.
template <class F>
struct FragmentCodes {
  uint32_t words[F::kFragmentWords];

  /// Fragment j of a tile in shared memory.
  __device__ void LoadShared(const char* tile, int lane, int j) {
    const char* from = tile + FragmentOffset(F::kBits, lane, j);
    if constexpr (F::kBits == 2) {
      words[0] = *reinterpret_cast<const uint16_t*>(from);
    } else if constexpr (F::kBits == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (F::kBits == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      words[0] = v.x, words[1] = v.y;
    } else {
      static_assert(F::kBits == 16);
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
  }
};

/// Adds sums of rows g (0, 1) and g + 8 (2, 3), each times its part of `scale`.
__device__ inline void AddScaled(const float (&part)[4], float2 scale, float (&sums)[4]) {
  sums[0] += part[0] * scale.x, sums[1] += part[1] * scale.x;
  sums[2] += part[2] * scale.y, sums[3] += part[3] * scale.y;
}

/// 1 / (1 + exp(-v)). kFast: with an error of some units in the last place of a float32, which 16-bit results do not show.
template <bool kFast>
__device__ inline float Sigmoid(float v) {
  if constexpr (kFast) return FastSigmoid2(v * 1.44269504088896341f);
  return 1.0f / (1.0f + expf(-v));
}

/// One activated value out of v, or out of gate v and up u.
template <Activation kType, bool kFast = false>
__device__ inline float ActivateAs(const ActivationParams& p, float v, float u) {
  if constexpr (kType == Activation::kRelu) return v < 0 ? 0 : v;  // keeps NaN
  if constexpr (kType == Activation::kGelu)
    return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
  if constexpr (kType == Activation::kSilu) return v * Sigmoid<kFast>(v);
  if constexpr (kType == Activation::kSwiglu) {
    const float gate = MinOrNan(v, p.gate_limit);
    const float activated = MinOrNan(gate * Sigmoid<kFast>(p.alpha * gate), p.activated_limit);
    const float up = MaxOrNan(MinOrNan(u, p.up_limit), -p.up_limit);
    return activated * (up + p.beta);
  }
  if constexpr (kType == Activation::kGeglu) {
    const float inner = 0.79788456080286536f * (v + 0.044715f * v * v * v);
    return 0.5f * v * (1.0f + tanhf(inner)) * u;
  }
  return v;
}

/// Calls fn.template operator()<type>() with the type as a constant.
template <class Fn>
__device__ auto WithActivation(Activation type, Fn&& fn) {
  switch (type) {
    case Activation::kRelu:
      return fn.template operator()<Activation::kRelu>();
    case Activation::kGelu:
      return fn.template operator()<Activation::kGelu>();
    case Activation::kSilu:
      return fn.template operator()<Activation::kSilu>();
    case Activation::kSwiglu:
      return fn.template operator()<Activation::kSwiglu>();
    case Activation::kGeglu:
      return fn.template operator()<Activation::kGeglu>();
    default:
      return fn.template operator()<Activation::kIdentity>();
  }
}

__device__ inline float Activate(const ActivationParams& p, float v, float u) {
  return WithActivation(p.type, [&]<Activation kType>() { return ActivateAs<kType>(p, v, u); });
}

/// One value of y, rounded to its type.
template <class T>
__device__ inline void StoreY(const CudaGemmArgs& args, int64_t row, int64_t column, float value) {
  const int64_t index = row * args.y_stride + column;
  if (args.y_is_float)
    static_cast<float*>(args.y)[index] = value;
  else
    static_cast<T*>(args.y)[index] = FromFloat<T>(value);
}

/// Writes y of one row tile: `sums` in shared memory is [row_count, stride], with 16 accumulators
/// in tile row order for each of kRowTiles weight row tiles from `first_row_tile` on. All kThreads
/// threads of the block take part; one thread keeps to one column.
template <class T, int kThreads, int kRowTiles>
__device__ void StoreRowTile(const CudaGemmArgs& args, const RowTile& tile, int first_row_tile,
                             const float* sums, int stride) {
  const int per_tile = args.gated ? kTileRows / 2 : kTileRows;  // columns of y
  const int columns = per_tile * kRowTiles;
  static_assert(kThreads % (kTileRows * kRowTiles) == 0);
  const int column = threadIdx.x % columns, tile_row = column % per_tile;
  const int row_tile = first_row_tile + column / per_tile;
  const int64_t y_column = int64_t(row_tile) * per_tile + tile_row;
  if (y_column >= (args.gated ? args.n / 2 : args.n)) return;

  const int64_t row_base = (int64_t(tile.expert) * args.row_tiles + row_tile) * kTileRows;
  const int slot = SlotOfTileRow(tile_row);  // gated: the up is in the next slot
  const float scale = args.row_scales[row_base + slot];
  const float bias = args.bias != nullptr ? args.bias[row_base + slot] : 0.0f;
  float up_scale = 0, up_bias = 0;
  if (args.gated) {
    up_scale = args.row_scales[row_base + slot + 1];
    if (args.bias != nullptr) up_bias = args.bias[row_base + slot + 1];
  }
  const float* sum = sums + column / per_tile * kTileRows + tile_row;
  for (int row = threadIdx.x / columns; row < tile.row_count; row += kThreads / columns) {
    const float v = sum[row * stride] * scale + bias;
    const float u = args.gated ? sum[row * stride + 8] * up_scale + up_bias : 0.0f;
    StoreY<T>(args, tile.row_begin + int64_t(row), y_column, Activate(args.activation, v, u));
  }
}

}  // namespace qmoe_plugin
