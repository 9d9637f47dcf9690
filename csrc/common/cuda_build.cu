#include "common/cuda_build.h"
#include "common/launch.cuh"

namespace reinforce_ada::cuda {

#ifdef __CUDACC__

extern "C" __global__ void does_nothing() {}

std::string compiler() { return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__); }

std::string architectures() { return RA_CUDA_ARCHITECTURES; }

bool emulated() { return false; }

std::optional<std::string> unusable_device(int index) {
    try {
        int count = 0, major = 0, minor = 0;
        check(cudaGetDeviceCount(&count), "no CUDA device can be used");
        if (index < 0 || index >= count) return "there is no CUDA device " + std::to_string(index) + " among " + std::to_string(count);
        const OnDevice selected(index);
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "a device without an architecture");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "a device without an architecture");
        cudaFuncAttributes kernel;
        const std::string here = "the device is sm_" + std::to_string(major) + std::to_string(minor);
        check(cudaFuncGetAttributes(&kernel, does_nothing), here + ", the kernels are built for " + architectures());
    } catch (const std::runtime_error& error) {
        cudaGetLastError();  // so that nobody later takes this error for their own
        return error.what();
    }
    return std::nullopt;
}

#else

std::string compiler() { return std::string("C++ ") + __VERSION__; }

std::string architectures() { return ""; }

bool emulated() { return true; }

std::optional<std::string> unusable_device(int) { return std::nullopt; }

#endif

}  // namespace reinforce_ada::cuda
