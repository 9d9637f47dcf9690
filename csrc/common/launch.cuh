// Kernels onto a stream, and errors into exceptions.
//
// A build for the CPU (common/device.cuh) has no CUDA runtime. There `cuda_on_cpu.h` declares
//   void reinforce_ada::run_on_cpu(unsigned grid_x, unsigned grid_y, unsigned threads, const std::function<void()>& thread);
// which calls `thread` once for every thread of every block, with threadIdx, blockIdx, blockDim and gridDim set.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/device.cuh"
#include "common/launch_words.h"

namespace reinforce_ada {

inline std::string describe(const char* kernel, std::initializer_list<Size> shape, const Grid& grid, unsigned threads) {
    std::string text = std::string(kernel) + ":";
    for (const Size& size : shape) text += std::string(" ") + size.name + " = " + std::to_string(size.value) + ",";
    return text + " a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " blocks of " + std::to_string(threads);
}

#ifdef __CUDACC__

inline void check(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess) throw std::runtime_error(what + "; CUDA says: " + cudaGetErrorString(error));
}

// Makes the device current while it lives.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "no current CUDA device");
        if (device != before_) check(cudaSetDevice(device), "CUDA device " + std::to_string(device) + " cannot be selected");
        changed_ = device != before_;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

#endif

// Puts kernel(args...) on the queue; `name` and `shape` are for the message where that fails. An empty grid is no launch.
template <class... Params>
void launch(void (*kernel)(Params...), const Grid& grid, unsigned threads, const Queue& queue, const char* name,
            std::initializer_list<Size> shape, typename Exactly<Params>::type... args) {
    if (grid.x == 0 || grid.y == 0) return;
    if (grid.x > 0x7fffffff || grid.y > 0xffff)
        throw std::invalid_argument(describe(name, shape, grid, threads) + "; past what CUDA can launch");
    const auto x = static_cast<unsigned>(grid.x), y = static_cast<unsigned>(grid.y);
#ifdef __CUDACC__
    try {
        const OnDevice selected(queue.device);
        kernel<<<dim3(x, y), threads, 0, reinterpret_cast<cudaStream_t>(queue.stream)>>>(args...);
        check(cudaGetLastError(), "the launch failed");
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(describe(name, shape, grid, threads) + ": " + error.what());
    }
#else
    (void)queue;
    run_on_cpu(x, y, threads, [=] { kernel(args...); });
#endif
}

}  // namespace reinforce_ada
