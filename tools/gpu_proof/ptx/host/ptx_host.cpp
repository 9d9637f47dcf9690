// The way from a launch to Python: `reinforce_ada_ptx_hook` of the module that Python has set.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include "common/launch.cuh"

namespace py = pybind11;

namespace {
py::object& hook() {
    static py::object* function = new py::object(py::none());  // outlives the interpreter's own clean-up
    return *function;
}
}  // namespace

void reinforce_ada::run_ptx(const char* symbol, std::int64_t grid_x, std::int64_t grid_y, unsigned threads, const Arguments& arguments) {
    const py::gil_scoped_acquire gil;
    py::list bytes;
    for (const std::string& argument : arguments) bytes.append(py::bytes(argument));
    hook()(symbol, grid_x, grid_y, threads, bytes);
}

extern "C" __attribute__((visibility("default"))) void reinforce_ada_set_hook(PyObject* function) {
    hook() = py::reinterpret_borrow<py::object>(function);
}
