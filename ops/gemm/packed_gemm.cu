#include <algorithm>
#include <bit>

#include "ops/common/cuda_host.h"
#include "ops/common/nvtx.h"
#include "ops/gemm/packed_gemm.cuh"

namespace qmoe_plugin {
namespace {

/// Kernels index rows and k, rounded up to tiles, with int.
constexpr int64_t kMaxExtent = INT32_MAX - 1024;

/// Whether the kernel may run for some number of rows.
bool MayRun(const Kernel& kernel, const Device& device, DType dtype) {
  return device.sm >= kernel.min_sm && device.sm <= kernel.max_sm &&
         std::ranges::find(kernel.dtypes, dtype) != kernel.dtypes.end() &&
         (kernel.available == nullptr || kernel.available());
}

const CudaGemm* GemmOf(const Kernel& kernel) { return static_cast<const CudaGemm*>(kernel.launch); }

}  // namespace

PackedGemm::PackedGemm(const Device& device, const GemmProblem& problem,
                       const ActivationParams& activation, const PackSource& source)
    : device_(device), problem_(problem), activation_(activation) {
  QMOE_REQUIRE(problem.n <= kMaxExtent && problem.k <= kMaxExtent, Describe(problem),
               " is too large; the CUDA kernels take up to ", kMaxExtent, " rows and columns");
  const DeviceScope scope(device.index);
  problem_.sm = device.sm;
  CheckCuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device.index),
            "asking for the number of multiprocessors");
  for (const Verdict& verdict : Explain(device, problem)) {
    if (!MayRun(*verdict.kernel, device, problem.dtype)) continue;
    GemmOf(*verdict.kernel)->prepare(problem.dtype, device.sm);
    candidates_.push_back(verdict.kernel);
  }
  tuned_ = Tuned(device, CudaDeviceName(device.index), problem);
  std::erase_if(tuned_, [&](const TunedRows& tuned) {
    return std::ranges::find(candidates_, tuned.kernel) == candidates_.end();
  });
  Choose(1);  // fails now rather than in a run if no kernel takes the problem
  Upload(source);
}

void PackedGemm::Upload(const PackSource& source) {
  weights_.header = source.Plan(IsGated(activation_.type), TargetOf(device_, problem_.dtype));
  weights_.shape = ShapeOf(weights_.header);
  weights_.memory =
      AllocateOnDevice(device_.index, weights_.header.bytes, "packed " + Describe(problem_));
  PackSink sink;
  sink.write = [this](size_t offset, const uint8_t* bytes, size_t size) {
    CopyToDevice(device_.index, weights_.memory.get() + offset, bytes, size);
  };
  source.Write(weights_.header, sink);
}

PackedGemm::Choice PackedGemm::Choose(int64_t rows) const {
  GemmProblem problem = problem_;
  problem.rows = rows;
  const auto takes = [&](const Kernel* kernel) {
    return kernel->refuse == nullptr || kernel->refuse(problem).empty();
  };
  for (const TunedRows& tuned : tuned_)
    if (rows >= tuned.first && rows <= tuned.last && takes(tuned.kernel))
      return {tuned.kernel, GemmOf(*tuned.kernel)->tile_rows(problem)};
  const auto chosen = std::ranges::find_if(candidates_, takes);
  const Kernel& kernel = chosen != candidates_.end() ? **chosen : Select(device_, problem);
  return {&kernel, GemmOf(kernel)->tile_rows(problem)};
}

void PackedGemm::Launch(const Choice& choice, const CudaGemmArgs& args, cudaStream_t stream) const {
  const NvtxRange range(Name(problem_.stage), choice.kernel->name);
  choice.gemm().launch(args, stream);
}

void PackedGemm::LaunchRouted(const Choice& choice, const CudaGemmArgs& args,
                              const FusedRoute& route, cudaStream_t stream) const {
  const NvtxRange range(Name(problem_.stage), choice.kernel->name);
  choice.gemm().launch_routed(args, route, stream);
}

CudaGemmArgs PackedGemm::Args(const Choice& choice) const {
  const PackedHeader& header = weights_.header;
  CudaGemmArgs args{};
  args.stage = problem_.stage;
  args.dtype = problem_.dtype;
  args.codes = weights_.codes();
  args.block_scales = weights_.block_scales();
  args.zero_offsets = weights_.zero_offsets();
  args.integer_offsets = (header.flags & PackedHeader::kIntegerOffsets) != 0;
  args.short_factors = (header.flags & PackedHeader::kShortFactors) != 0;
  args.coarse_scales = (header.flags & PackedHeader::kCoarseScales) != 0;
  args.row_scales = weights_.row_scales();
  args.bias = weights_.bias();
  args.codebook = weights_.codebook();
  args.tile_bytes = weights_.shape.tile_bytes;
  args.n = int(header.rows);
  args.k = int(header.k);
  args.row_tiles = int(weights_.shape.row_tiles);
  args.weight_tiles = int(weights_.shape.row_tiles * header.experts);
  args.block_shift = header.block_size ? std::countr_zero(header.block_size) : 31;
  args.groups = int(std::max<int64_t>(weights_.shape.groups, 1));
  args.gated = weights_.gated();
  args.tile_rows = choice.tile_rows;
  args.activation = activation_;
  args.sm = device_.sm;
  args.multiprocessors = multiprocessors_;
  return args;
}

}  // namespace qmoe_plugin
