// QMoE on the CPU, the same way for one token and for thousands:
//
//   1. route every token; sort the routes (token, j) by expert into rows
//   2. fc1: tasks of (expert, up to 96 of its rows, 128 columns), bias and activation at their end
//   3. fc2: the same tasks, one result row a route
//   4. add up each token's rows, times their factors, in the order of j
//
// Between fc1 and fc2 values stay float32: exacter than rounding to the activation type as the
// stock ops do, and nothing is gained by rounding (unless they are quantised, see QuantizeHidden, or
// fc2's kernel takes less, see PackedMatrix::StoreRow). No sum depends on the tasks, so neither does
// any bit of the result. Long prompts go through in chunks, which bounds the workspace.
#include <algorithm>
#include <numeric>

#include "ops/cpu/packed_matrix.h"
#include "ops/cpu/routing.h"
#include "ops/qmoe/activation_quant.h"
#include "ops/qmoe/qmoe.h"

namespace qmoe_plugin {
namespace {

using cpu::Arena;
using cpu::kTaskColumns;
using cpu::kTaskRows;
using cpu::MatrixProduct;
using cpu::PackedMatrix;
using cpu::PartStart;
using cpu::StoredRow;

/// Routes (tokens * topk) of a chunk: enough rows an expert to amortise reading its weights.
constexpr int64_t kChunkRoutes = 4096;
// A task has whole blocks of activations that share a scale.
static_assert(kTaskColumns / 2 % 32 == 0 && kMxBlock == 32 && cpu::kPiece % 32 == 0);
/// Tokens that are routed, and columns that are combined, at a time.
constexpr int64_t kRouteTokens = 8;
constexpr int64_t kCombineColumns = 512;

/// Some rows of one expert: the unit of work along M. Their activations start at these bytes.
struct RowBlock {
  int32_t expert, first, count;
  int64_t x_at, h_at;
};

/// The workspace of a chunk of T tokens, R = T * topk routes; a row is a route, sorted by expert.
struct Scratch {
  uint8_t* x;           // [T] rows for fc1: the input
  int32_t* expert_ids;  // [T, topk]
  float* factors;       // [T, topk]
  int32_t* row_of;      // [T, topk] row of each route
  int32_t* token_of;    // [R] token of each row
  int32_t* counts;      // [E] rows an expert
  int32_t* starts;      // [E] its first row
  int32_t* order;       // [E] experts, most rows first
  RowBlock* blocks;     // [R / kTaskRows + E]
  uint8_t* expert_x;    // [R] rows for fc1 by expert, where rows are not read by an index
  uint8_t* h;           // [R] rows for fc2: activated fc1
  float* y;             // [R, fc2 columns]
};

GemmProblem Problem(const MoeConfig& config, const PackSource& source, GemmStage stage) {
  // A format that defines the rounding of its activations leaves none to accuracy_level.
  const bool defined = config.activation_quant != ActivationQuant::kNone;
  return {.stage = stage,
          .dtype = config.dtype,
          .format = &source.format(),
          .experts = config.experts,
          .n = source.rows(),
          .k = source.k(),
          .block_size = source.block_size(),
          .zero_points = source.has_zero_points(),
          .activation = stage == GemmStage::kFc1 ? config.activation.type : Activation::kIdentity,
          .accuracy_level = defined ? AccuracyLevel{0} : config.accuracy_level};
}

class CpuQMoe : public QMoe {
 public:
  CpuQMoe(const MoeConfig& config, const PackSource& fc1, const PackSource& fc2)
      : config_(config),
        fc1_(fc1, Problem(config, fc1, GemmStage::kFc1)),
        fc2_(fc2, Problem(config, fc2, GemmStage::kFc2)) {}

  size_t WorkspaceBytes(int64_t tokens) const override {
    Arena arena(nullptr);
    TakeScratch(ProductsFor(tokens), arena, std::min(tokens, ChunkTokens()));
    return arena.used();
  }

  std::vector<PackedHeader> Packed() const override { return {fc1_.header(), fc2_.header()}; }

  void Run(const MoeTensors& tensors, const ExecutionContext& context) const override {
    Arena arena(context.workspace);
    const Products products = ProductsFor(tensors.tokens);
    const Scratch scratch = TakeScratch(products, arena, std::min(tensors.tokens, ChunkTokens()));
    for (int64_t first = 0; first < tensors.tokens; first += ChunkTokens())
      RunChunk(products, Slice(tensors, first), scratch, context);
  }

 private:
  /// How a run multiplies.
  struct Products {
    const MatrixProduct &fc1, &fc2;
    bool x_by_expert;  // rows of fc1 are stored by expert, not by token
  };

  int64_t ChunkTokens() const { return std::max<int64_t>(1, kChunkRoutes / config_.topk); }

  Products ProductsFor(int64_t tokens) const {
    const MatrixProduct& fc1 = fc1_.For(tokens * config_.topk);
    return {fc1, fc2_.For(tokens * config_.topk),
            fc1.InTiles() || DifferByExpert(config_.fc1_act_scales)};
  }

  Scratch TakeScratch(const Products& products, Arena& arena, int64_t tokens) const {
    const int64_t routes = tokens * config_.topk, experts = config_.experts;
    const int64_t blocks = routes / kTaskRows + experts;
    const auto [fc1, fc2, x_by_expert] = products;
    return {.x = arena.Take<uint8_t>(x_by_expert ? 0 : tokens * fc1.row_bytes()),
            .expert_ids = arena.Take<int32_t>(routes),
            .factors = arena.Take<float>(routes),
            .row_of = arena.Take<int32_t>(routes),
            .token_of = arena.Take<int32_t>(routes),
            .counts = arena.Take<int32_t>(experts),
            .starts = arena.Take<int32_t>(experts),
            .order = arena.Take<int32_t>(experts),
            .blocks = arena.Take<RowBlock>(blocks),
            .expert_x = arena.Take<uint8_t>(x_by_expert ? fc1.BytesOfBlocks(routes, blocks) : 0),
            .h = arena.Take<uint8_t>(fc2.BytesOfBlocks(routes, blocks)),
            .y = arena.Take<float>(routes * fc2_.columns())};
  }

  /// The tensors of the chunk that starts with token `first`.
  MoeTensors Slice(const MoeTensors& all, int64_t first) const {
    const auto row = [first](auto* data, int64_t columns, DType dtype) {
      return cpu::Advance(data, first * columns * int64_t(SizeOf(dtype)));
    };
    MoeTensors chunk = all;
    chunk.tokens = std::min(ChunkTokens(), all.tokens - first);
    chunk.input = row(all.input, config_.hidden_size, config_.dtype);
    chunk.router_probs = row(all.router_probs, config_.experts, all.router_probs_dtype);
    chunk.router_weights = row(all.router_weights, config_.experts, all.router_weights_dtype);
    chunk.output = row(all.output, config_.hidden_size, config_.dtype);
    return chunk;
  }

  /// The output may be the input: it is written by the last step only, and to this chunk's rows.
  void RunChunk(const Products& products, const MoeTensors& chunk, const Scratch& scratch,
                const ExecutionContext& context) const {
    const int64_t token_blocks = (chunk.tokens + kRouteTokens - 1) / kRouteTokens;
    cpu::RunTasks(context, token_blocks, [&](size_t i) {
      const int64_t last = std::min(chunk.tokens, int64_t(i + 1) * kRouteTokens);
      for (int64_t t = int64_t(i) * kRouteTokens; t < last; ++t)
        LoadToken(products, chunk, t, scratch);
    });
    const int64_t blocks = SortByExpert(products, chunk.tokens, scratch);
    if (products.x_by_expert)
      cpu::RunTasks(context, blocks, [&](size_t i) {
        StoreByExpert(products.fc1, chunk, scratch, scratch.blocks[i]);
      });
    cpu::RunTasks(context, blocks * fc1_.tasks(), [&](size_t i) {
      Fc1(products, scratch, scratch.blocks[int64_t(i) / fc1_.tasks()], int64_t(i) % fc1_.tasks());
    });
    cpu::RunTasks(context, blocks * fc2_.tasks(), [&](size_t i) {
      const RowBlock& block = scratch.blocks[int64_t(i) / fc2_.tasks()];
      const int64_t task = int64_t(i) % fc2_.tasks();
      products.fc2.Multiply(
          block.expert, task,
          {scratch.h + block.h_at, products.fc2.row_bytes(), nullptr, block.count},
          scratch.y + block.first * fc2_.columns() + task * kTaskColumns, fc2_.columns());
    });
    cpu::RunTasks(context, chunk.tokens,
                  [&](size_t token) { Combine(chunk, scratch, int64_t(token)); });
  }

  /// Routes a token and stores its activations.
  void LoadToken(const Products& products, const MoeTensors& chunk, int64_t token,
                 const Scratch& scratch) const {
    const CpuIsa& isa = products.fc1.isa();
    const int64_t experts = config_.experts;
    const auto load_row = [&](const void* data, DType dtype, int64_t columns, float* out) {
      isa.to_float(cpu::Advance(data, token * columns * int64_t(SizeOf(dtype))), dtype, columns,
                   out);
    };
    float logits[cpu::kMaxExperts], weights[cpu::kMaxExperts];
    load_row(chunk.router_probs, chunk.router_probs_dtype, experts, logits);
    if (chunk.router_weights)
      load_row(chunk.router_weights, chunk.router_weights_dtype, experts, weights);
    cpu::RouteToken(config_, logits, chunk.router_weights ? weights : nullptr,
                    scratch.expert_ids + token * config_.topk,
                    scratch.factors + token * config_.topk);
    if (!products.x_by_expert)
      StoreToken(products.fc1, chunk, token, 0, products.fc1.RowAt(scratch.x, chunk.tokens, token));
  }

  /// A row of fc1 from a token, quantised with the expert's scale if activations are.
  void StoreToken(const MatrixProduct& fc1, const MoeTensors& chunk, int64_t token, int64_t expert,
                  const StoredRow& row) const {
    float piece[cpu::kPiece];
    for (int64_t first = 0; first < config_.hidden_size; first += cpu::kPiece) {
      const int64_t count = std::min(cpu::kPiece, config_.hidden_size - first);
      const int64_t at = token * config_.hidden_size + first;
      fc1.isa().to_float(cpu::Advance(chunk.input, at * int64_t(SizeOf(config_.dtype))),
                         config_.dtype, count, piece);
      QuantizeActivations(config_.activation_quant,
                          ActivationScaleOf(config_.fc1_act_scales, expert), count, piece);
      fc1.StoreRow(piece, first, count, row);
    }
    fc1.EndRow(config_.hidden_size, row);
  }

  void StoreByExpert(const MatrixProduct& fc1, const MoeTensors& chunk, const Scratch& scratch,
                     const RowBlock& block) const {
    for (int64_t r = 0; r < block.count; ++r)
      StoreToken(fc1, chunk, scratch.token_of[block.first + r], block.expert,
                 fc1.RowAt(scratch.expert_x + block.x_at, block.count, r));
  }

  /// Sorts the routes by expert, in the order of tokens within an expert, and cuts each expert's
  /// rows into blocks, biggest expert first. Returns the number of blocks.
  int64_t SortByExpert(const Products& products, int64_t tokens, const Scratch& scratch) const {
    const int64_t routes = tokens * config_.topk, experts = config_.experts;
    std::fill_n(scratch.counts, experts, 0);
    for (int64_t r = 0; r < routes; ++r) ++scratch.counts[scratch.expert_ids[r]];
    std::exclusive_scan(scratch.counts, scratch.counts + experts, scratch.starts, 0);
    for (int64_t r = 0; r < routes; ++r) {
      const int32_t row = scratch.starts[scratch.expert_ids[r]]++;
      scratch.row_of[r] = row;
      scratch.token_of[row] = int32_t(r / config_.topk);
    }
    std::iota(scratch.order, scratch.order + experts, 0);
    std::sort(scratch.order, scratch.order + experts, [&](int32_t a, int32_t b) {
      return scratch.counts[a] != scratch.counts[b] ? scratch.counts[a] > scratch.counts[b] : a < b;
    });
    int64_t blocks = 0, x_at = 0, h_at = 0;
    for (int64_t i = 0; i < experts && scratch.counts[scratch.order[i]] > 0; ++i) {
      const int32_t expert = scratch.order[i], count = scratch.counts[expert];
      const int32_t start = scratch.starts[expert] - count;  // filling has moved it to the end
      const int64_t parts = (count + kTaskRows - 1) / kTaskRows;
      for (int64_t p = 0; p < parts; ++p) {
        const int32_t first = int32_t(PartStart(count, parts, p));
        const int32_t last = int32_t(PartStart(count, parts, p + 1));
        scratch.blocks[blocks++] = {expert, start + first, last - first, x_at, h_at};
        x_at += products.fc1.StoredBytes(last - first);
        h_at += products.fc2.StoredBytes(last - first);
      }
    }
    return blocks;
  }

  /// One task of fc1: activated columns of h, and the zeros behind the last one.
  void Fc1(const Products& products, const Scratch& scratch, const RowBlock& block,
           int64_t task) const {
    const auto [fc1, fc2, x_by_expert] = products;
    const int64_t per_value = IsGated(config_.activation.type) ? 2 : 1;
    const int64_t column = task * kTaskColumns / per_value;
    const int64_t columns = std::min(kTaskColumns / per_value, config_.inter_size - column);
    float sums[kTaskRows * kTaskColumns];
    const int64_t row_bytes = fc1.row_bytes();
    MatrixProduct::Rows x{scratch.x, row_bytes, scratch.token_of + block.first, block.count};
    if (x_by_expert) x = {scratch.expert_x + block.x_at, row_bytes, nullptr, block.count};
    fc1.Multiply(block.expert, task, x, sums, kTaskColumns);
    for (int64_t r = 0; r < block.count; ++r) {
      float h[kTaskColumns];
      fc1.isa().activate(config_.activation, sums + r * kTaskColumns, columns, h);
      if (config_.activation_quant != ActivationQuant::kNone)
        QuantizeHidden(fc1.isa(), block.expert, columns, h);
      const StoredRow row = fc2.RowAt(scratch.h + block.h_at, block.count, r);
      fc2.StoreRow(h, column, columns, row);
      if (task == fc1_.tasks() - 1) fc2.EndRow(config_.inter_size, row);
    }
  }

  /// Some activated values, beginning with a block. Rounded to the activation type first: CUDA has
  /// them in that type, and both must quantise the same numbers.
  void QuantizeHidden(const CpuIsa& isa, int64_t expert, int64_t count, float* h) const {
    alignas(float) uint8_t rounded[kTaskColumns * sizeof(float)];
    isa.from_float(h, count, config_.dtype, rounded);
    isa.to_float(rounded, config_.dtype, count, h);
    QuantizeActivations(config_.activation_quant, ActivationScaleOf(config_.fc2_act_scales, expert),
                        count, h);
  }

  void Combine(const MoeTensors& chunk, const Scratch& scratch, int64_t token) const {
    const CpuIsa& isa = fc2_.For(0).isa();
    for (int64_t column = 0; column < config_.hidden_size; column += kCombineColumns) {
      const int64_t columns = std::min(kCombineColumns, config_.hidden_size - column);
      float sums[kCombineColumns] = {};
      for (int64_t route = token * config_.topk; route < (token + 1) * config_.topk; ++route)
        isa.add_scaled(scratch.factors[route],
                       scratch.y + scratch.row_of[route] * fc2_.columns() + column, columns, sums);
      const int64_t at = token * config_.hidden_size + column;
      isa.from_float(sums, columns, config_.dtype,
                     cpu::Advance(chunk.output, at * int64_t(SizeOf(config_.dtype))));
    }
  }

  const MoeConfig config_;
  const PackedMatrix fc1_, fc2_;
};

}  // namespace

std::unique_ptr<QMoe> MakeCpuQMoe(const MoeConfig& config, const PackSource& fc1,
                                  const PackSource& fc2) {
  return std::make_unique<CpuQMoe>(config, fc1, fc2);
}

}  // namespace qmoe_plugin
