// The Python module: what was built, and which kernels run. Its import registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "host/gemm.h"
#include "host/workspace.h"
#include "simd/dispatch.h"

// The architectures of the CUDA kernels; setup.py defines FASTPEFT_CUDA if it found nvcc.
#ifdef FASTPEFT_CUDA
#define FASTPEFT_CUDA_ARCHS FASTPEFT_CUDA
#else
#define FASTPEFT_CUDA_ARCHS "none"
#endif

namespace fastpeft {
extern const char *const version, *const sources;  // setup.py writes them
#ifdef FASTPEFT_CUDA
std::pair<int, int> cuda_versions();
#endif
bool set_fourbit_path(const std::string& name);
std::string linear4bit_path(int64_t M, int64_t K, const std::string& dtype, int64_t block_size);
}  // namespace fastpeft

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of fastpeft";
  m.attr("version") = fastpeft::version;
  m.attr("sources") = fastpeft::sources;
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["cuda"] = FASTPEFT_CUDA_ARCHS;
    info["isa"] = fastpeft::kernels().name;
    return info;
  });
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (fastpeft::set_isa(name)) return;
        std::string known = "auto";
        for (const std::string& one : fastpeft::isas()) known += ", " + one;
        throw pybind11::value_error("set_isa: name must be one of " + known + " and run on this processor, got '" +
                                    name + "'");
      },
      pybind11::arg("name"));
  m.def("isas", &fastpeft::isas);
  m.def(
      "set_fourbit_path",
      [](const std::string& name) {
        if (!fastpeft::set_fourbit_path(name))
          throw pybind11::value_error("set_fourbit_path: name must be auto, gemv, fused or panels, got '" + name + "'");
      },
      pybind11::arg("name"));
  m.def("linear4bit_path", &fastpeft::linear4bit_path, pybind11::arg("M"), pybind11::arg("K"), pybind11::arg("dtype"),
        pybind11::arg("block_size"));
#ifdef FASTPEFT_CUDA
  m.def("cuda_versions", &fastpeft::cuda_versions);
#endif
  m.def("kept_bytes", &fastpeft::kept_bytes);
  m.def("release_kept", &fastpeft::release_kept);
  m.def("set_native_gemm", &fastpeft::set_native_gemm, pybind11::arg("bf16"), pybind11::arg("f16"));
}
