// Counting checks, for test programs that go on after a failure.
#pragma once

#include <cstdio>

#include "ops/error.h"

namespace qmoe_plugin {

inline int checks = 0, failures = 0;

}  // namespace qmoe_plugin

/// Counts a check; if it fails, prints where and the message, for the first 20 failures.
#define EXPECT(ok, ...)                                                            \
  do {                                                                             \
    ++checks;                                                                      \
    if (!(ok) && ++failures <= 20)                                                 \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, Concat(__VA_ARGS__).c_str()); \
  } while (false)
