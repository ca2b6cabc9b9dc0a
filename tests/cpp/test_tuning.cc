// Tuning files: what they prefer, and what is said of wrong ones. The GPU is a simulated one.
#include "ops/tuning.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "ops/error.h"
#include "ops/formats/format.h"
#include "tests/cpp/expect.h"

namespace qmoe_plugin {
namespace {

struct tuned : formats::FormatBase<tuned, 4> {
  static constexpr char kName[] = "test_tuned";
  static constexpr float kDefaultZeroPoint = 8;
  static constexpr bool kZeroPoints = true;
  static float Decode(uint32_t code) { return float(code) - 8; }
};

Kernel Fake(const char* stem, int priority, std::string (*refuse)(const GemmProblem&)) {
  Kernel kernel;
  kernel.name = Concat(stem, ".test_tuned");
  kernel.stem = stem;
  kernel.format = FindFormat("test_tuned");
  kernel.device = DeviceType::kCuda;
  kernel.min_sm = 80, kernel.max_sm = 129;
  kernel.dtypes = {DType::kFloat16};
  kernel.priority = priority;
  kernel.refuse = refuse;
  return kernel;
}

[[maybe_unused]] const bool registered =
    RegisterFormat(DescribeFormat<tuned>()) &&
    RegisterKernel(Fake("few", 2,
                        [](const GemmProblem& p) -> std::string {
                          return p.rows > 16 ? "it is for 16 rows and fewer" : "";
                        })) &&
    RegisterKernel(Fake("many", 1, nullptr));

const Device kHopper{.type = DeviceType::kCuda, .index = 0, .sm = 90};
const Device kAmpere{.type = DeviceType::kCuda, .index = 0, .sm = 80};
const std::string kName = "NVIDIA H200";

GemmProblem Problem(int64_t rows) {
  GemmProblem problem;
  problem.stage = GemmStage::kFc1;
  problem.dtype = DType::kFloat16;
  problem.format = FindFormat("test_tuned");
  problem.experts = 8, problem.topk = 2, problem.n = 64, problem.k = 128;
  problem.block_size = 32;
  problem.rows = rows;
  return problem;
}

constexpr char kProblem[] =
    "fc1 test_tuned float16 experts 8 topk 2 n 64 k 128 block_size 32 zero_points 0";

/// A file with this text, which the variable names.
class File {
 public:
  explicit File(const std::string& text) : path_(Concat("/tmp/test_tuning_", getpid(), ".txt")) {
    std::ofstream(path_) << text;
    setenv("QMOE_PLUGIN_TUNING", path_.c_str(), 1);
  }
  ~File() {
    unsetenv("QMOE_PLUGIN_TUNING");
    std::remove(path_.c_str());
  }

 private:
  std::string path_;
};

std::string Chosen(const Device& device, int64_t rows) {
  return Select(device, Problem(rows)).stem;
}

void TestPreferred() {
  EXPECT(Chosen(kHopper, 4) == "few", "the priority");
  EXPECT(Tuned(kHopper, kName, Problem(4)).empty(), "no file, nothing preferred");
  const File file(Concat(TuningHeader(kHopper, kName), "# found by hand\n\n", kProblem,
                         " rows 3 8 kernel many\n", kProblem, " rows 17 64 kernel few\n",
                         "fc2 test_tuned float16 experts 8 topk 2 n 64 k 128 block_size 32 "
                         "zero_points 0 rows 1 64 kernel many\n"));
  EXPECT(Chosen(kHopper, 2) == "few", "before the rows of the line");
  EXPECT(Chosen(kHopper, 3) == "many", "its first row");
  EXPECT(Chosen(kHopper, 8) == "many", "its last row");
  EXPECT(Chosen(kHopper, 9) == "few", "behind them");
  EXPECT(Chosen(kHopper, 32) == "many", "a preferred kernel that refuses");
  EXPECT(Chosen(kAmpere, 4) == "few", "another GPU");
  EXPECT(Tuned(kHopper, kName, Problem(4)).size() == 2, "the lines of the problem");
  GemmProblem other = Problem(4);
  other.zero_points = true;
  EXPECT(Tuned(kHopper, kName, other).empty(), "another problem");
}

void ExpectRefused(const std::string& text, const std::string& part) {
  const File file(text);
  try {
    Tuned(kHopper, kName, Problem(4));
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT(what.find(part) != std::string::npos, "'", what, "' should contain '", part, "'");
    EXPECT(what.find("python -m qmoe_plugin tune") != std::string::npos, "'", what, "'");
    return;
  }
  EXPECT(false, "no error where '", part, "' was expected");
}

void TestWrongFiles() {
  const std::string header = TuningHeader(kHopper, kName);
  ExpectRefused("", "line 1");
  ExpectRefused("qmoe_plugin tuning 2\n", "not 'qmoe_plugin tuning 1'");
  ExpectRefused(std::string(3000, 'x'), "line 1");
  ExpectRefused("qmoe_plugin tuning 1\n", "line 2");
  ExpectRefused(TuningHeader(kHopper, "NVIDIA H100"), "this is 'device sm_90 NVIDIA H200'");
  ExpectRefused(TuningHeader(kAmpere, kName), "line 2");
  ExpectRefused("qmoe_plugin tuning 1\ndevice sm_90 NVIDIA H200\nkernels 12\n", "another build");
  for (const char* end : {"", " rows", " rows 1 4", " rows 1 4 kernel", " rows 0 4 kernel many",
                          " rows 4 1 kernel many", " rows a b kernel many",
                          " rows 1 4 kernel many x", " rows 1 99999999999999999999 kernel many"})
    ExpectRefused(Concat(header, kProblem, end, "\n"), "line 4");
  ExpectRefused(Concat(header, kProblem, " rows 1 4 kernel none\n"),
                "there is no CUDA kernel none");
  setenv("QMOE_PLUGIN_TUNING", "/nowhere/at/all", 1);
  try {
    Tuned(kHopper, kName, Problem(4));
    EXPECT(false, "a file that is not there");
  } catch (const Error& error) {
    EXPECT(std::strstr(error.what(), "cannot be read"), error.what());
  }
  unsetenv("QMOE_PLUGIN_TUNING");
}

}  // namespace
}  // namespace qmoe_plugin

int main() {
  using namespace qmoe_plugin;
  TestPreferred();
  TestWrongFiles();
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
