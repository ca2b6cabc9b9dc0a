# Cross-compiles for AArch64 Linux, and runs the tests under qemu-user where that is installed:
#
#   apt-get install g++-aarch64-linux-gnu qemu-user-static
#   cmake -S . -B build/aarch64 -G Ninja -DQMOE_PLUGIN_CUDA=OFF -DQMOE_PLUGIN_TESTS=ON \
#     -DCMAKE_TOOLCHAIN_FILE=cmake/toolchains/aarch64-linux-gnu.cmake
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

# `max` has every extension that qemu knows. Which one runs is chosen at run time, so QEMU_CPU=cortex-a53 in the
# environment tests a processor that has none of them.
find_program(QMOE_PLUGIN_QEMU NAMES qemu-aarch64-static qemu-aarch64)
if(QMOE_PLUGIN_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${QMOE_PLUGIN_QEMU} -L /usr/aarch64-linux-gnu)
endif()
