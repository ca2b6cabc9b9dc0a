// Division by a number that the host knows.
#pragma once

#include <bit>
#include <cstdint>

namespace qmoe_plugin {

/// Division of numbers below 2^31 by one that the host knows; the GPU has no instruction for it, and blocks begin with many.
class FastDivisor {
 public:
  FastDivisor() = default;
  explicit FastDivisor(uint32_t divisor)
      : divisor_(divisor),
        shift_(divisor > 1 ? std::bit_width(divisor - 1) - 1 : 0),
        multiplier_(uint32_t(((uint64_t(1) << (32 + shift_)) + divisor - 1) / divisor)) {}

  __device__ int Divide(int n) const {
    return divisor_ == 1 ? n : int(__umulhi(uint32_t(n), multiplier_) >> shift_);
  }

 private:
  uint32_t divisor_;
  int shift_;
  uint32_t multiplier_;  // 2^(32 + shift) / divisor, rounded up; unused for 1
};

}  // namespace qmoe_plugin
