// Stands before csrc/common/launch.cuh on the include path when the launchers are built to have nvcc's PTX run in the place of their
// kernels: a launch hands over the kernel's symbol and its arguments.
#pragma once

#include <dlfcn.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/device.cuh"
#include "common/launch_words.h"

namespace reinforce_ada {

using Arguments = std::vector<std::string>;  // the bytes of each

// In ptx_host.cpp.
void run_ptx(const char* symbol, std::int64_t grid_x, std::int64_t grid_y, unsigned threads, const Arguments& arguments);

template <class T>
std::string bytes_of(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>, "kernels take plain values");
    return {reinterpret_cast<const char*>(&value), sizeof value};
}

template <class... Params>
void launch(void (*kernel)(Params...), const Grid& grid, unsigned threads, const Queue&, const char* name, std::initializer_list<Size>,
            typename Exactly<Params>::type... args) {
    if (grid.x == 0 || grid.y == 0) return;
    Dl_info info{};
    if (dladdr(reinterpret_cast<void*>(kernel), &info) == 0 || info.dli_sname == nullptr)
        throw std::runtime_error(std::string(name) + ": its kernel has no symbol");
    run_ptx(info.dli_sname, grid.x, grid.y, threads, {bytes_of(args)...});
}

}  // namespace reinforce_ada
