// What the CUDA build is, and whether it can run on a device.
#pragma once

#include <optional>
#include <string>

namespace reinforce_ada::cuda {

// The compiler of the kernels, e.g. "nvcc 13.0".
std::string compiler();

// What kernels were compiled for, e.g. "sm_80 sm_90 compute_90": machine code of the first two, and PTX that later devices compile.
std::string architectures();

// Whether the kernels run on the CPU, on tensors of the CPU.
bool emulated();

// Why kernels cannot run on the device of this index, in words; none when they can.
std::optional<std::string> unusable_device(int index);

}  // namespace reinforce_ada::cuda
