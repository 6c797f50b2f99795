// dsmoe_ext._C: what is not a tensor op. It needs no torch; importing it loads the ops library
// beside it, which registers the ops in torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/machine.h"
#include "kernels.h"

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const char* const* name = dsmoe::cpu::isas(); *name; ++name) names.emplace_back(*name);
  return names;
}

void force_isa(const std::string& name) {
  if (dsmoe::cpu::force_isa(name.c_str())) return;
  std::string known;
  for (const std::string& isa : isas()) known += (known.empty() ? "" : ", ") + isa;
  throw pybind11::value_error("This machine and build cannot run ISA '" + name +
                              "'; use one of: " + known + ".");
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = DSMOE_VERSION;
  info["torch"] = DSMOE_TORCH_VERSION;
  info["compiler"] = DSMOE_COMPILER;
  info["cuda"] = DSMOE_CUDA_VERSION;
  info["max_cuda_experts"] = dsmoe::cuda::kMaxExperts;
  info["isas"] = isas();
  info["isa"] = dsmoe::cpu::isa();
  info["amx"] = dsmoe::cpu::amx_state_text();
  return info;
}

pybind11::dict measure_peaks(int threads) {
  dsmoe::cpu::Peaks peaks;
  {
    pybind11::gil_scoped_release release;
    peaks = dsmoe::cpu::measure_peaks(threads);
  }
  pybind11::dict result;
  result["fp32_flops"] = peaks.fp32_flops;
  result["bf16_flops"] = peaks.bf16_flops;
  result["read_bytes"] = peaks.read_bytes;
  return result;
}

#ifdef DSMOE_WITH_CUDA
void set_cuda_settings(int64_t workspace_bytes, int32_t group_size, int32_t router_tiles,
                       int32_t multiprocessors, int32_t path, int32_t parts) {
  dsmoe::cuda::set_settings({workspace_bytes, group_size, router_tiles, multiprocessors,
                             static_cast<dsmoe::cuda::Path>(path), parts});
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What was built, against what, and which instruction sets this machine runs.");
  m.def("isa", &dsmoe::cpu::isa, "The instruction set that the CPU kernels use.");
  m.def("force_isa", &force_isa, pybind11::arg("name"),
        "Uses another instruction set; pack weights again after it.");
#ifdef DSMOE_WITH_CUDA
  m.def("set_cuda_settings", &set_cuda_settings, "See dsmoe_ext.cuda_settings.");
#endif
  m.def("measure_peaks", &measure_peaks, pybind11::arg("threads"),
        "Operations and bytes per second that this machine reaches at most on so many threads.");
}
