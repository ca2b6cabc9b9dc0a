#include <algorithm>
#include <bit>

#include "ops/common/cuda_host.h"
#include "ops/gemm/packed_gemm.cuh"
#include "ops/pack.h"

namespace qmoe_plugin {
namespace {

/// Choices are remembered for up to so many tokens; above that, selecting anew costs nothing beside
/// the run.
constexpr int64_t kRememberedSteps = 32;
/// Kernels index rows and k, rounded up to tiles, with int.
constexpr int64_t kMaxExtent = INT32_MAX - 1024;

/// Whether the kernel may run for some number of rows.
bool MayRun(const Kernel& kernel, const Device& device, DType dtype) {
  return device.sm >= kernel.min_sm && device.sm <= kernel.max_sm &&
         std::ranges::find(kernel.dtypes, dtype) != kernel.dtypes.end();
}

}  // namespace

PackedGemm::PackedGemm(const Device& device, const GemmProblem& problem, int64_t row_step,
                       const ActivationParams& activation, const RowReader& reader)
    : device_(device), problem_(problem), row_step_(row_step), activation_(activation) {
  const DeviceScope scope(device.index);
  QMOE_REQUIRE(problem.n <= kMaxExtent && problem.k <= kMaxExtent, Describe(problem),
               " is too large; the CUDA kernels take up to ", kMaxExtent, " rows and columns");
  for (const Verdict& verdict : Explain(device, problem))
    if (MayRun(*verdict.kernel, device, problem.dtype))
      static_cast<const CudaGemm*>(verdict.kernel->launch)->prepare(problem.dtype);
  for (int64_t i = 0; i <= kRememberedSteps; ++i) choices_.push_back(Select(i * row_step));
  Upload(reader);
}

void PackedGemm::Upload(const RowReader& reader) {
  // float16 holds scales with up to 11 significant bits exactly, and 16-bit products could use no
  // more.
  const ScalePolicy policy =
      problem_.dtype == DType::kFloat32 ? ScalePolicy::kFloat32 : ScalePolicy::kFloat16;
  weights_.header = PlanPack(reader, IsGated(activation_.type), Layout::kCudaTile16x64, policy);
  weights_.shape = ShapeOf(weights_.header);
  weights_.memory =
      AllocateOnDevice(device_.index, weights_.header.bytes, "packed " + Describe(problem_));
  PackSink sink;
  sink.write = [this](size_t offset, const uint8_t* bytes, size_t size) {
    CopyToDevice(device_.index, weights_.memory.get() + offset, bytes, size);
  };
  Pack(reader, weights_.header, sink);
}

PackedGemm::Choice PackedGemm::Select(int64_t rows) const {
  GemmProblem problem = problem_;
  problem.rows = rows;
  const Kernel& kernel = qmoe_plugin::Select(device_, problem);
  const auto* gemm = static_cast<const CudaGemm*>(kernel.launch);
  return {gemm, gemm->tile_rows(problem)};
}

PackedGemm::Choice PackedGemm::Choose(int64_t rows) const {
  const int64_t step = rows / row_step_;
  return step <= kRememberedSteps ? choices_[size_t(step)] : Select(rows);
}

GemmArgs PackedGemm::Args(const Choice& choice) const {
  const PackedHeader& header = weights_.header;
  GemmArgs args{};
  args.dtype = problem_.dtype;
  args.codes = weights_.codes();
  args.block_scales = weights_.block_scales();
  args.zero_offsets = weights_.zero_offsets();
  args.row_scales = weights_.row_scales();
  args.bias = weights_.bias();
  args.tile_bytes = weights_.shape.tile_bytes;
  args.n = int(header.rows);
  args.k = int(header.k);
  args.row_tiles = int(weights_.shape.row_tiles);
  args.block_shift = header.block_size ? std::countr_zero(header.block_size) : 31;
  args.scale_groups = int(weights_.shape.groups);
  args.offset_groups = int(std::max<int64_t>(weights_.shape.groups, 1));
  args.gated = weights_.gated();
  args.tile_rows = choice.tile_rows;
  args.activation = activation_;
  return args;
}

}  // namespace qmoe_plugin
