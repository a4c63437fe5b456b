// The Python face of the native code: addresses and sizes in, no mathematics. Tensors never cross; the caller keeps
// them alive until the call returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "dtype.h"
#include "irls.h"
#ifdef SUBSPACE_HAS_CUDA
#include "fold_weight.h"
#endif

namespace py = pybind11;
using namespace subspace;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

IrlsSizes checked_sizes(std::int64_t layers, std::int64_t adapters, std::int64_t rank, std::int64_t sb,
                        std::int64_t sa, std::int64_t k, std::int64_t max_iter) {
  SUBSPACE_CHECK(layers >= 0 && adapters > 0 && rank > 0 && sb > 0 && sa > 0 && max_iter >= 0,
                 "irls: sizes must be positive, got layers ", layers, ", adapters ", adapters, ", rank ", rank,
                 ", sb ", sb, ", sa ", sa, ", max_iter ", max_iter);
  SUBSPACE_CHECK(k >= 1 && k <= sb && k <= sa, "irls: k must be in 1..min(sb, sa), got k ", k, ", sb ", sb, ", sa ",
                 sa);
  return {layers, adapters, rank, sb, sa, k, max_iter};
}

void irls(Address rb, Address ra, std::int64_t layers, std::int64_t adapters, std::int64_t rank, std::int64_t sb,
          std::int64_t sa, std::int64_t k, double p, double eps, std::int64_t max_iter, double tol, Address u,
          Address v, Address singular_values, Address weights, Address residuals, Address objective, Address n_iter,
          Address converged, Address workspace, std::int64_t threads) {
  const IrlsSizes sizes = checked_sizes(layers, adapters, rank, sb, sa, k, max_iter);
  SUBSPACE_CHECK(threads >= 1, "irls: threads must be at least 1, got ", threads);
  const IrlsOutputs outputs{at<double>(u),         at<double>(v),
                            at<double>(singular_values), at<double>(weights),
                            at<double>(residuals), at<double>(objective),
                            at<std::int64_t>(n_iter), at<std::uint8_t>(converged)};
  py::gil_scoped_release unlocked;
  irls_cpu({at<const double>(rb), at<const double>(ra)}, sizes, {p, eps, tol}, outputs, at<double>(workspace),
           threads);
}

#ifdef SUBSPACE_HAS_CUDA
DType checked_dtype(int code) {
  SUBSPACE_CHECK(code >= 0 && code <= 2, "fold_weight: dtype code must be 0, 1 or 2, got ", code);
  return static_cast<DType>(code);
}

void fold_weight(Address w, int w_dtype, std::int64_t w_stride, Address left, std::int64_t left_stride,
                 Address right, std::int64_t right_stride, Address w_eff, int w_eff_dtype, std::int64_t w_eff_stride,
                 std::int64_t out, std::int64_t in, std::int64_t rank, double scale, Address stream) {
  SUBSPACE_CHECK(out >= 0 && in >= 0 && rank >= 0, "fold_weight: sizes must not be negative, got out ", out, ", in ",
                 in, ", rank ", rank);
  const FoldWeight arguments{at<const void>(w), checked_dtype(w_dtype), w_stride, at<const float>(left), left_stride,
                             at<const float>(right), right_stride, at<void>(w_eff), checked_dtype(w_eff_dtype),
                             w_eff_stride, out, in, rank, static_cast<float>(scale)};
  py::gil_scoped_release unlocked;
  fold_weight_cuda(arguments, at<void>(stream));
}
#endif

std::int64_t workspace_doubles(std::int64_t adapters, std::int64_t rank, std::int64_t sb, std::int64_t sa,
                               std::int64_t k) {
  return irls_workspace(checked_sizes(1, adapters, rank, sb, sa, k, 0));
}

py::dict build_info() {
  py::dict info;
  info["version"] = SUBSPACE_VERSION;
  info["compiler"] = SUBSPACE_COMPILER;
  info["cpp_standard"] = static_cast<long long>(__cplusplus / 100 % 100);
  info["threads"] = true;
#ifdef SUBSPACE_HAS_CUDA
  info["cuda_built"] = true;
  info["cuda_version"] = SUBSPACE_CUDA_VERSION;
  std::vector<std::string> archs;
  std::string word;
  for (const char letter : std::string(SUBSPACE_CUDA_ARCHS) + ",") {
    if (letter != ',') {
      word += letter;
    } else if (!word.empty()) {
      archs.push_back(word);
      word.clear();
    }
  }
  info["cuda_archs"] = archs;
#else
  info["cuda_built"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = std::vector<std::string>{};
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of subspace_ext; addresses are integers, sizes and strides count elements.";
  m.def("build_info", &build_info);
  m.def("irls_workspace", &workspace_doubles, py::arg("adapters"), py::arg("rank"), py::arg("sb"), py::arg("sa"),
        py::arg("k"));
  m.def("irls", &irls, py::arg("rb"), py::arg("ra"), py::arg("layers"), py::arg("adapters"), py::arg("rank"),
        py::arg("sb"), py::arg("sa"), py::arg("k"), py::arg("p"), py::arg("eps"), py::arg("max_iter"), py::arg("tol"),
        py::arg("u"), py::arg("v"), py::arg("singular_values"), py::arg("weights"), py::arg("residuals"),
        py::arg("objective"), py::arg("n_iter"), py::arg("converged"), py::arg("workspace"), py::arg("threads"));
#ifdef SUBSPACE_HAS_CUDA
  m.attr("cuda_built") = true;
  m.def("fold_weight", &fold_weight, py::arg("w"), py::arg("w_dtype"), py::arg("w_stride"), py::arg("left"),
        py::arg("left_stride"), py::arg("right"), py::arg("right_stride"), py::arg("w_eff"), py::arg("w_eff_dtype"),
        py::arg("w_eff_stride"), py::arg("out"), py::arg("in_"), py::arg("rank"), py::arg("scale"), py::arg("stream"));
#else
  m.attr("cuda_built") = false;
#endif
}
