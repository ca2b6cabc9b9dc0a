// QMoE on CUDA: route, permute, fc1 with its activation, fc2, unpermute. Where fc1's kernel wants the rows of x sorted, permute
// copies them into the workspace. With quantised activations x is quantised into the workspace, before route, or before fc1 where
// it needs to know the experts; the hidden rows in place before fc2. For few tokens fc1 and fc2 route, and quantise what they read, by
// themselves where their kernels can, and three launches are left; for one token fc2 adds up what its experts give, and two are left.
//
// Long inputs are processed in chunks of tokens, one after the other in the same workspace, so that
// the intermediate rows take at most kChunkBytes. Each token's output depends on its own input row
// only, and a chunk's output is written after its input has been read for the last time: the output
// may be the input.
#include <algorithm>

#include "ops/common/cuda_host.h"
#include "ops/gemm/packed_gemm.cuh"
#include "ops/qmoe/activation_quant.cuh"
#include "ops/qmoe/activation_quant.h"
#include "ops/qmoe/permute.cuh"
#include "ops/qmoe/qmoe.h"
#include "ops/qmoe/route.cuh"
#include "ops/qmoe/unpermute.cuh"

namespace qmoe_plugin {
namespace {

/// Intermediate rows (sorted x, hidden, y) of a chunk. Weights are read once a chunk; with this much there
/// are at least some hundred rows an expert, where that is hidden behind arithmetic.
constexpr int64_t kChunkBytes = int64_t(512) << 20;
constexpr int64_t kMinChunkTokens = 16;

/// Up to so many rows of fc2 are kept in float32 until they are added up; more would cost bandwidth.
constexpr int64_t kMaxFloatRows = 1024;

/// Hands out pieces of the workspace, 256-byte aligned; from a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* Take(int64_t elements) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (size_t(elements) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

GemmProblem Problem(GemmStage stage, const MoeConfig& config, const PackSource& source) {
  GemmProblem problem;
  problem.stage = stage;
  problem.dtype = config.dtype;
  problem.format = &source.format();
  problem.experts = config.experts;
  problem.topk = config.topk;
  problem.n = source.rows();
  problem.k = source.k();
  problem.block_size = source.block_size();
  problem.zero_points = source.has_zero_points();
  if (stage == GemmStage::kFc1) problem.activation = config.activation.type;
  problem.accuracy_level = config.accuracy_level;
  return problem;
}

class CudaQMoe final : public QMoe {
 public:
  CudaQMoe(const Device& device, const MoeConfig& config, const PackSource& fc1,
           const PackSource& fc2)
      : device_(device),
        config_(config),
        fc1_(device, Problem(GemmStage::kFc1, config, fc1), config.activation, fc1),
        fc2_(device, Problem(GemmStage::kFc2, config, fc2), {.type = Activation::kIdentity}, fc2),
        quantize_by_expert_(DifferByExpert(config.fc1_act_scales)) {
    const DeviceScope scope(device.index);
    PrepareRoute();
    PreparePermute();
    PrepareUnpermute(config.dtype);
    if (Quantizes()) PrepareActivationQuant(config.dtype);
    if (config.activation_quant == ActivationQuant::kFp8) UploadActivationScales();
    const int64_t token_values = config.topk * (config.inter_size + 2 * config.hidden_size);
    const int64_t token_bytes = token_values * int64_t(SizeOf(config.dtype));
    chunk_tokens_ = std::max(kMinChunkTokens, kChunkBytes / token_bytes);
  }

  size_t WorkspaceBytes(int64_t tokens) const override {
    if (tokens == 0) return 0;
    const int64_t chunk = ChunkTokens(tokens);
    // The last chunk has fewer rows, but may use smaller row tiles and so need a longer list.
    return std::max(ChunkBytes(chunk), ChunkBytes(tokens % chunk));
  }

  std::vector<PackedHeader> Packed() const override { return {fc1_.header(), fc2_.header()}; }

  void Run(const MoeTensors& tensors, const ExecutionContext& context) const override {
    const DeviceScope scope(device_.index);
    const int64_t chunk = tensors.tokens > 0 ? ChunkTokens(tensors.tokens) : 0;
    for (int64_t first = 0; first < tensors.tokens; first += chunk)
      RunChunk(tensors, first, std::min(chunk, tensors.tokens - first), context);
  }

 private:
  /// Where the intermediate tensors of a chunk lie.
  struct Buffers {
    PackedGemm::Choice fc1, fc2;
    int64_t fc1_max_tiles, fc2_max_tiles;
    int* expert_ids;            // [T, k]
    float* scales;              // [T, k]
    int* slice_counts;          // [slices, E], see LaunchRoute
    int* expert_offsets;        // [E + 1]
    int* row_token;             // [T * k]
    int* sorted_row;            // [T, k]
    bool fused;                 // fc1 and fc2 route by themselves
    int* arrivals;              // [row tiles of fc2], for one token only
    SharedRoute* shared_route;  // for more tokens, if fused
    RowTile *fc1_tiles, *fc2_tiles;
    int *fc1_tile_count, *fc2_tile_count, *fc1_next_item, *fc2_next_item;
    // x for fc1; null = not needed (`sorted`: or done when it was quantised).
    char* quantized;  // [T, H], or [T * k, H] sorted rows where experts differ
    char* sorted;     // [T * k, H]
    char* hidden;     // [T * k, I] sorted rows
    char* y;          // [T * k, H] sorted rows
    bool y_is_float;
  };

  bool Quantizes() const { return config_.activation_quant != ActivationQuant::kNone; }

  /// Of each chunk but the last: all are about equally large.
  int64_t ChunkTokens(int64_t tokens) const {
    const int64_t chunks = (tokens + chunk_tokens_ - 1) / chunk_tokens_;
    return (tokens + chunks - 1) / chunks;
  }

  void UploadActivationScales() {
    std::vector<float> scales = config_.fc1_act_scales;
    scales.insert(scales.end(), config_.fc2_act_scales.begin(), config_.fc2_act_scales.end());
    const size_t bytes = scales.size() * sizeof(float);
    act_scales_ = AllocateOnDevice(device_.index, bytes, "activation scales");
    CopyToDevice(device_.index, act_scales_.get(), scales.data(), bytes);
  }

  size_t ChunkBytes(int64_t tokens) const {
    Arena arena(nullptr);
    if (tokens > 0) Plan(tokens, arena);
    return arena.used();
  }

  Buffers Plan(int64_t tokens, Arena& arena) const {
    const int64_t rows = tokens * config_.topk, size = int64_t(SizeOf(config_.dtype));
    Buffers b;
    b.fc1 = fc1_.Choose(rows), b.fc2 = fc2_.Choose(rows);
    b.fc1_max_tiles = MaxRowTiles(rows, config_.experts, b.fc1.tile_rows);
    b.fc2_max_tiles = MaxRowTiles(rows, config_.experts, b.fc2.tile_rows);
    b.expert_ids = arena.Take<int>(rows);
    b.scales = arena.Take<float>(rows);
    b.slice_counts = arena.Take<int>(Slices(int(tokens)) * config_.experts);
    b.expert_offsets = arena.Take<int>(config_.experts + 1);
    b.row_token = arena.Take<int>(rows);
    b.sorted_row = arena.Take<int>(rows);
    b.fused = MayFuse(tokens, b);
    b.shared_route = b.fused && tokens > 1 ? arena.Take<SharedRoute>(1) : nullptr;
    b.arrivals = tokens == 1 ? arena.Take<int>(fc2_.row_tiles()) : nullptr;
    b.fc1_tiles = arena.Take<RowTile>(b.fc1_max_tiles);
    b.fc2_tiles = arena.Take<RowTile>(b.fc2_max_tiles);
    b.fc1_tile_count = arena.Take<int>(1);
    b.fc2_tile_count = arena.Take<int>(1);
    b.fc1_next_item = arena.Take<int>(1);
    b.fc2_next_item = arena.Take<int>(1);
    const int64_t row_bytes = config_.hidden_size * size;
    b.quantized = b.sorted = nullptr;
    if (Quantizes() && !b.fused)
      b.quantized = arena.Take<char>((quantize_by_expert_ ? rows : tokens) * row_bytes);
    if (b.fc1.gemm().wants_sorted_x && !(Quantizes() && quantize_by_expert_))
      b.sorted = arena.Take<char>(rows * row_bytes);
    b.hidden = arena.Take<char>(rows * config_.inter_size * size);
    b.y_is_float = config_.dtype != DType::kFloat32 && rows <= kMaxFloatRows;
    b.y = arena.Take<char>(rows * config_.hidden_size * (b.y_is_float ? 4 : size));
    return b;
  }

  void RunChunk(const MoeTensors& tensors, int64_t first, int64_t tokens,
                const ExecutionContext& context) const {
    const auto stream = static_cast<cudaStream_t>(context.stream);
    Arena arena(context.workspace);
    const Buffers b = Plan(tokens, arena);
    const int64_t row_bytes = config_.hidden_size * int64_t(SizeOf(config_.dtype));

    const RouteArgs route = Route(tensors, first, tokens, b);
    const int rows = int(tokens * config_.topk);
    const Overlap overlap = OverlapOn(device_.sm);

    CudaGemmArgs fc1 = fc1_.Args(b.fc1);
    fc1.x = static_cast<const char*>(tensors.input) + first * row_bytes;
    fc1.x_stride = config_.hidden_size;
    fc1.x_rows = b.row_token;
    fc1.tiles = b.fc1_tiles, fc1.tile_count = b.fc1_tile_count, fc1.max_tiles = b.fc1_max_tiles;
    fc1.rows = rows;
    fc1.next_item = b.fc1_next_item;
    fc1.y = b.hidden;
    fc1.y_stride = config_.inter_size;

    CudaGemmArgs fc2 = fc2_.Args(b.fc2);
    fc2.x = b.hidden;
    fc2.x_stride = config_.inter_size;
    fc2.tiles = b.fc2_tiles, fc2.tile_count = b.fc2_tile_count, fc2.max_tiles = b.fc2_max_tiles;
    fc2.rows = rows;
    fc2.next_item = b.fc2_next_item;
    fc2.y = b.y;
    fc2.y_stride = config_.hidden_size;
    fc2.y_is_float = b.y_is_float;
    fc2.overlap = overlap;

    if (b.fused) {
      fc1.x_quant = fc2.x_quant = config_.activation_quant;
      fc1.x_scales = ActScales(0), fc2.x_scales = ActScales(1);
      FusedRoute fc1_route{}, fc2_route{};
      fc1_route.enabled = fc2_route.enabled = true;
      fc1_route.route = fc2_route.route = route;
      fc1_route.x_is_tokens = true;
      fc1_route.shared = fc2_route.shared = b.shared_route;
      fc1_route.sorted_row = b.sorted_row;
      fc2_route.route.scales = nullptr;
      if (tokens == 1) {
        fc1_route.arrivals = fc2_route.arrivals = b.arrivals;
        fc1_route.arrival_count = fc2.row_tiles;
        fc2_route.output = static_cast<char*>(tensors.output) + first * row_bytes;
      }
      fc1.tiles = fc2.tiles = nullptr;
      fc1_.LaunchRouted(b.fc1, fc1, fc1_route, stream);
      fc2_.LaunchRouted(b.fc2, fc2, fc2_route, stream);
      if (tokens == 1) return;
    } else {
      if (Quantizes() && !quantize_by_expert_) QuantizeX(b, tokens, fc1, stream);
      LaunchRoute(route, b.slice_counts, stream);
      LaunchPermute({.expert_ids = b.expert_ids,
                     .slice_counts = b.slice_counts,
                     .tokens = route.tokens,
                     .experts = route.experts,
                     .topk = route.topk,
                     .expert_offsets = b.expert_offsets,
                     .row_token = b.row_token,
                     .sorted_row = b.sorted_row,
                     .fc1 = {b.fc1.tile_rows, b.fc1_tiles, b.fc1_tile_count, b.fc1_next_item},
                     .fc2 = {b.fc2.tile_rows, b.fc2_tiles, b.fc2_tile_count, b.fc2_next_item},
                     .x = fc1.x,
                     .sorted = b.sorted,
                     .row_bytes = row_bytes,
                     .overlap = overlap},
                    stream);
      fc1.overlap = overlap;
      fc1.tiles_are_new = true;
      if (Quantizes() && quantize_by_expert_) QuantizeX(b, tokens, fc1, stream);
      if (b.sorted != nullptr) fc1.x = b.sorted, fc1.x_rows = nullptr;
      fc1_.Launch(b.fc1, fc1, stream);
      if (Quantizes()) QuantizeHidden(b, rows, overlap, stream);
      fc2_.Launch(b.fc2, fc2, stream);
    }

    LaunchUnpermute({.dtype = config_.dtype,
                     .y_is_float = b.y_is_float,
                     .y = b.y,
                     .sorted_row = b.sorted_row,
                     .scales = b.scales,
                     .tokens = int(tokens),
                     .topk = route.topk,
                     .hidden_size = int(config_.hidden_size),
                     .output = static_cast<char*>(tensors.output) + first * row_bytes,
                     .overlap = overlap},
                    stream);
  }

  RouteArgs Route(const MoeTensors& tensors, int64_t first, int64_t tokens,
                  const Buffers& b) const {
    RouteArgs route{};
    route.logits_dtype = tensors.router_probs_dtype;
    route.logits = RowsFrom(tensors.router_probs, route.logits_dtype, first);
    route.weights_dtype = tensors.router_weights_dtype;
    if (tensors.router_weights != nullptr)
      route.weights = RowsFrom(tensors.router_weights, route.weights_dtype, first);
    route.tokens = int(tokens);
    route.experts = int(config_.experts);
    route.topk = int(config_.topk);
    route.shared = int(config_.shared_experts);
    route.normalize = config_.normalize_routing_weights;
    route.sparse_mixer = config_.use_sparse_mixer;
    route.expert_ids = b.expert_ids;
    route.scales = b.scales;
    return route;
  }

  /// Whether fc1 and fc2 route by themselves.
  bool MayFuse(int64_t tokens, const Buffers& b) const {
    return tokens <= kFusedTokens && tokens * config_.topk <= kFusedRows &&
           config_.experts <= kFusedExperts &&
           (!Quantizes() || (b.fc1.gemm().quantizes_x && b.fc2.gemm().quantizes_x)) &&
           b.fc1.gemm().launch_routed != nullptr && b.fc2.gemm().launch_routed != nullptr &&
           std::min(b.fc1.tile_rows, b.fc2.tile_rows) >= tokens;
  }

  /// [E] of fc1 (0) or fc2 (1); null where there are none.
  const float* ActScales(int gemm) const {
    const auto* scales = reinterpret_cast<const float*>(act_scales_.get());
    return scales != nullptr ? scales + gemm * config_.experts : nullptr;
  }

  /// Quantises what fc1 reads, and makes it read that.
  void QuantizeX(const Buffers& b, int64_t tokens, CudaGemmArgs& fc1, cudaStream_t stream) const {
    LaunchActivationQuant({.dtype = config_.dtype,
                           .mode = config_.activation_quant,
                           .x = fc1.x,
                           .x_rows = quantize_by_expert_ ? b.row_token : nullptr,
                           .rows = quantize_by_expert_ ? fc1.rows : tokens,
                           .k = int(config_.hidden_size),
                           .scales = ActScales(0),
                           .expert_offsets = quantize_by_expert_ ? b.expert_offsets : nullptr,
                           .experts = int(config_.experts),
                           .y = b.quantized,
                           .overlap = Overlap::kNone},
                          stream);
    fc1.x = b.quantized;
    if (quantize_by_expert_) fc1.x_rows = nullptr;  // they are in sorted order already
  }

  void QuantizeHidden(const Buffers& b, int64_t rows, Overlap overlap, cudaStream_t stream) const {
    LaunchActivationQuant({.dtype = config_.dtype,
                           .mode = config_.activation_quant,
                           .x = b.hidden,
                           .x_rows = nullptr,
                           .rows = rows,
                           .k = int(config_.inter_size),
                           .scales = ActScales(1),
                           .expert_offsets = b.expert_offsets,
                           .experts = int(config_.experts),
                           .y = b.hidden,
                           .overlap = overlap},
                          stream);
  }

  /// Row `first` of a [T, E] tensor.
  const void* RowsFrom(const void* data, DType dtype, int64_t first) const {
    return static_cast<const char*>(data) + first * config_.experts * int64_t(SizeOf(dtype));
  }

  Device device_;
  MoeConfig config_;
  PackedGemm fc1_, fc2_;
  bool quantize_by_expert_;              // x in fc1
  std::shared_ptr<uint8_t> act_scales_;  // float32 [2, E] of fc1 and fc2, on the device; kFp8 only
  int64_t chunk_tokens_;
};

}  // namespace

std::unique_ptr<QMoe> MakeCudaQMoe(const Device& device, const MoeConfig& config,
                                   const PackSource& fc1, const PackSource& fc2) {
  return std::make_unique<CudaQMoe>(device, config, fc1, fc2);
}

}  // namespace qmoe_plugin
