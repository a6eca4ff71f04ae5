// fastsae._host: what has no operator schema. Build facts and the choice of instruction set; never
// tensors, and no torch header, so it does not depend on torch's ABI.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/isa.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and the choice of CPU instruction set.";
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"version", FASTSAE_VERSION},
            {"torch", FASTSAE_TORCH_VERSION},
            {"torch_target", FASTSAE_TORCH_TARGET_NAME},
            {"compiler", FASTSAE_COMPILER},
            {"cuda", FASTSAE_CUDA_VERSION},
            {"cuda_archs", FASTSAE_CUDA_ARCHS},
        };
      },
      "What the libraries were built with; empty strings for what was left out.");
  m.def(
      "isa", [] { return std::string(fastsae_isa()); },
      "The instruction set in use: scalar, avx2 or avx512.");
  m.def(
      "best_isa", [] { return std::string(fastsae_best_isa()); },
      "The best instruction set of this machine.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (fastsae_set_isa(name.c_str()) != 0) {
          throw pybind11::value_error("set_isa: expected scalar, avx2 or avx512, at most " +
                                      std::string(fastsae_best_isa()) + ", got " + name);
        }
      },
      "Switch every CPU kernel to an instruction set; for tests and measurements.",
      pybind11::arg("name"));
}
