// The emulator itself: that it computes what a GPU does, and that it finds what a GPU would hang or fail on.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <vector>

#include "ops/common/cuda_host.h"
#include "ops/common/hopper.cuh"
#include "ops/common/types.cuh"
#include "tests/cpp/expect.h"

using namespace qmoe_plugin;

namespace {

/// Whether `work` ends the process as the emulator does.
template <class Work>
bool Fails(const Work& work) {
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    work();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status);
}

template <class... Params, class... Args>
void Run(void (*kernel)(Params...), int threads, size_t shared_bytes, Args&&... args) {
  Launch("kernel", kernel, 1, threads, shared_bytes, nullptr, std::forward<Args>(args)...);
}

void sum_of_block(const int* x, int* sums) {
  __shared__ int parts[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = __reduce_add_sync(0xffffffff, x[threadIdx.x]);
  if (lane == 0) parts[warp] = part;
  __syncthreads();
  sums[threadIdx.x] = parts[0] + parts[1] + __shfl_sync(0xffffffff, parts[2], 5);
}

void TestThreads() {
  std::vector<int> x(96), sums(96);
  int total = 0;
  for (int i = 0; i < 96; ++i) total += x[i] = i * i;
  Run(sum_of_block, 96, 0, x.data(), sums.data());
  for (int i = 0; i < 96; ++i) EXPECT(sums[i] == total, "thread ", i, " has ", sums[i]);
}

void copy_through_shared(const uint4* x, uint4* y, bool waits) {
  char* shared = DynamicShared();
  CopyAsync16(shared + threadIdx.x * 16, x + threadIdx.x, true);
  CopyAsyncCommit();
  if (waits) CopyAsyncWait<0>();
  __syncthreads();
  y[threadIdx.x] = LoadShared16(SharedAddress(shared) + (threadIdx.x ^ 1) * 16);
}

void TestCopies() {
  std::vector<uint4> x(64), y(64);
  for (unsigned i = 0; i < 64; ++i) x[i] = {i, i + 1, i + 2, i + 3};
  Run(copy_through_shared, 64, 1024, x.data(), y.data(), true);
  for (unsigned i = 0; i < 64; ++i) EXPECT(y[i].y == (i ^ 1) + 1, "copied ", y[i].y, " to ", i);
  Run(copy_through_shared, 64, 1024, x.data(), y.data(), false);
  EXPECT(y[5].x == 0xffffffff, "data came before it was waited for: ", y[5].x);
  EXPECT(Fails([&] { Run(copy_through_shared, 64, 1000, x.data(), y.data(), true); }),
         "an access behind shared memory");
  EXPECT(Fails([&] {
           Run(copy_through_shared, 64, 1024, reinterpret_cast<const uint4*>(&x[0].y), y.data(),
               true);
         }),
         "a copy of 16 bytes that are not aligned");
}

/// One 64 x 32 x 64 product of a warpgroup by wgmma, and by mma; b is [32, 64] in x's layout.
void products(const float* a, const CUtensorMap b, float* d, float* e) {
  const uint32_t begin = SharedAddress(DynamicShared()), aligned = (begin + 1023) / 1024 * 1024;
  const uint32_t barrier = aligned + 32 * 128;
  if (threadIdx.x == 0) {
    BarrierInit(barrier, 1);
    BarrierArriveExpecting(barrier, 32 * 128);
    TensorCopy(aligned, b, 0, 0, barrier);
  }
  __syncthreads();
  BarrierWait(barrier, 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float sums[16] = {}, slow[4][4] = {};
  WgmmaFence();
  for (int step = 0; step < 4; ++step) {
    uint32_t fragment[4];
    for (int i = 0; i < 4; ++i) {
      const float* pair = a + (16 * warp + g + i % 2 * 8) * 64 + 16 * step + 2 * t + i / 2 * 8;
      fragment[i] = PackPair<__half>(pair[0], pair[1]);
    }
    Wgmma<__half, 32>(sums, fragment, SwizzledOperand(aligned) + 2 * step);
    for (int n = 0; n < 4; ++n) {
      uint32_t r[4];
      const int row = 8 * n + lane % 8, chunk = 2 * step + lane / 8 % 2;
      LoadMatrix4(r, aligned + row * 128 + (chunk ^ row % 8) * 16);
      Mma<__half>(slow[n], fragment, r[0], r[1]);
    }
  }
  WgmmaCommit();
  WgmmaWait<0>();
  for (int n = 0; n < 4; ++n)
    for (int i = 0; i < 4; ++i) {
      const int at = (16 * warp + g + i / 2 * 8) * 32 + 8 * n + 2 * t + i % 2;
      d[at] = sums[4 * n + i], e[at] = slow[n][i];
    }
}

void TestProducts() {
  std::vector<float> a(64 * 64), d(64 * 32), e(64 * 32);
  std::vector<__half> b(32 * 64);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(int(i * 7 % 13) - 6);
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(int(i * 5 % 11) - 5);
  const CUtensorMap map{reinterpret_cast<const char*>(b.data()), 64, 32, 128, 64, 32, 2, true};
  Run(products, 128, 8192, a.data(), map, d.data(), e.data());
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < 32; ++n) {
      float sum = 0;
      for (int k = 0; k < 64; ++k) sum += a[m * 64 + k] * float(b[n * 64 + k]);
      EXPECT(d[m * 32 + n] == sum, "wgmma: ", d[m * 32 + n], " at ", m, ", ", n, ", not ", sum);
      EXPECT(e[m * 32 + n] == sum, "mma: ", e[m * 32 + n], " at ", m, ", ", n, ", not ", sum);
    }
}

void wait_forever() {
  const uint32_t barrier = SharedAddress(DynamicShared());
  if (threadIdx.x == 0) BarrierInit(barrier, 2);
  __syncthreads();
  if (threadIdx.x == 1) BarrierArrive(barrier);
  BarrierWait(barrier, 0);
}
void half_a_warp_shuffles() {
  if (threadIdx.x < 16) __shfl_sync(0xffffffff, 1, 0);
}
void different_instructions() {
  if (threadIdx.x < 16)
    __shfl_sync(0xffffffff, 1, 0);
  else
    __syncwarp();
}

void TestWhatHangs() {
  EXPECT(Fails([] { Run(wait_forever, 32, 64); }), "a barrier that lacks an arrival");
  EXPECT(Fails([] { Run(half_a_warp_shuffles, 32, 0); }), "a shuffle that lanes miss");
  EXPECT(Fails([] { Run(different_instructions, 32, 0); }), "a warp in two instructions");
}

}  // namespace

int main() {
  TestThreads();
  TestCopies();
  TestProducts();
  TestWhatHangs();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
