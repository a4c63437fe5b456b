// The Python face of the native code: addresses and sizes in, no mathematics. Tensors never cross; the caller keeps
// them alive until the call returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "dtype.h"
#include "irls.h"
#include "rank_update.h"
#ifdef SUBSPACE_HAS_CUDA
#include "core_grad.h"
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

IrlsOutputs irls_outputs(Address u, Address v, Address singular_values, Address weights, Address residuals,
                         Address objective, Address n_iter, Address converged) {
  return {at<double>(u),         at<double>(v),         at<double>(singular_values),
          at<double>(weights),   at<double>(residuals), at<double>(objective),
          at<std::int64_t>(n_iter), at<std::uint8_t>(converged)};
}

void irls(Address rb, Address ra, std::int64_t layers, std::int64_t adapters, std::int64_t rank, std::int64_t sb,
          std::int64_t sa, std::int64_t k, double p, double eps, std::int64_t max_iter, double tol, Address u,
          Address v, Address singular_values, Address weights, Address residuals, Address objective, Address n_iter,
          Address converged, Address workspace, std::int64_t threads) {
  const IrlsSizes sizes = checked_sizes(layers, adapters, rank, sb, sa, k, max_iter);
  SUBSPACE_CHECK(threads >= 1, "irls: threads must be at least 1, got ", threads);
  const IrlsOutputs outputs =
      irls_outputs(u, v, singular_values, weights, residuals, objective, n_iter, converged);
  py::gil_scoped_release unlocked;
  irls_cpu({at<const double>(rb), at<const double>(ra)}, sizes, {p, eps, tol}, outputs, at<double>(workspace),
           threads);
}

DType checked_dtype(const char* name, int code) {
  SUBSPACE_CHECK(code >= 0 && code <= 2, name, ": dtype code must be 0, 1 or 2, got ", code);
  return static_cast<DType>(code);
}

void rank_update_on_cpu(Address jobs, std::int64_t count, int out_dtype, std::int64_t threads) {
  const auto* array = at<const RankUpdate>(jobs);
  SUBSPACE_CHECK(threads >= 1, "rank_update: threads must be at least 1, got ", threads);
  for (std::int64_t i = 0; i < count; ++i) {
    SUBSPACE_CHECK(array[i].rows >= 0 && array[i].columns >= 0 && array[i].rank >= 0,
                   "rank_update: sizes must not be negative, got rows ", array[i].rows, ", columns ",
                   array[i].columns, ", rank ", array[i].rank, " in job ", i);
  }
  const DType out = checked_dtype("rank_update", out_dtype);
  py::gil_scoped_release unlocked;
  rank_update_cpu(array, count, out, threads);
}

bool same_bytes(Address left, Address right, std::int64_t count) {
  return std::memcmp(at<const void>(left), at<const void>(right), static_cast<std::size_t>(count)) == 0;
}

#ifdef SUBSPACE_HAS_CUDA
void irls_on_gpu(Address rb, Address ra, std::int64_t layers, std::int64_t adapters, std::int64_t rank,
                 std::int64_t sb, std::int64_t sa, std::int64_t k, double p, double eps, std::int64_t max_iter,
                 double tol, Address u, Address v, Address singular_values, Address weights, Address residuals,
                 Address objective, Address n_iter, Address converged, Address workspace, std::int64_t blocks,
                 Address stream) {
  const IrlsSizes sizes = checked_sizes(layers, adapters, rank, sb, sa, k, max_iter);
  const IrlsOutputs outputs =
      irls_outputs(u, v, singular_values, weights, residuals, objective, n_iter, converged);
  py::gil_scoped_release unlocked;
  irls_cuda({at<const double>(rb), at<const double>(ra)}, sizes, {p, eps, tol}, outputs, at<double>(workspace),
            blocks, at<void>(stream));
}

// jobs: address of the host array, whose first_block words are set here.
py::tuple plan_rank_updates(Address jobs, std::int64_t count) {
  auto* array = at<RankUpdate>(jobs);
  for (std::int64_t i = 0; i < count; ++i) {
    SUBSPACE_CHECK(array[i].rows >= 0 && array[i].columns >= 0 && array[i].rank >= 0,
                   "rank_update: sizes must not be negative, got rows ", array[i].rows, ", columns ",
                   array[i].columns, ", rank ", array[i].rank, " in job ", i);
  }
  const RankUpdatePlan plan = rank_update_plan(array, count);
  return py::make_tuple(plan.blocks, plan.tiles_per_block);
}

void rank_update(Address jobs, Address device_jobs, std::int64_t count, std::int64_t blocks,
                 std::int64_t tiles_per_block, int base_dtype, int left_dtype, int out_dtype, bool stochastic,
                 std::int64_t seed, Address stream) {
  const RankUpdateTypes types{checked_dtype("rank_update", base_dtype), checked_dtype("rank_update", left_dtype),
                              checked_dtype("rank_update", out_dtype)};
  py::gil_scoped_release unlocked;
  rank_update_cuda(at<const RankUpdate>(jobs), at<const RankUpdate>(device_jobs), count, {blocks, tiles_per_block},
                   types, stochastic ? Rounding::kStochastic : Rounding::kNearest, seed, at<void>(stream));
}

void core_grad(Address g, std::int64_t g_stride, Address p, std::int64_t p_stride, int dtype, Address partial,
               Address dc, std::int64_t tokens, std::int64_t rank, std::int64_t splits, double scale,
               Address stream) {
  SUBSPACE_CHECK(tokens >= 0 && rank >= 0, "core_grad: sizes must not be negative, got tokens ", tokens, ", rank ",
                 rank);
  const CoreGrad arguments{at<const void>(g), g_stride, at<const void>(p), p_stride, checked_dtype("core_grad", dtype),
                           at<float>(partial), at<float>(dc), tokens, rank, splits, static_cast<float>(scale)};
  py::gil_scoped_release unlocked;
  core_grad_cuda(arguments, at<void>(stream));
}
#endif

std::int64_t workspace_doubles(std::int64_t adapters, std::int64_t rank, std::int64_t sb, std::int64_t sa,
                               std::int64_t k) {
  return irls_workspace(checked_sizes(1, adapters, rank, sb, sa, k, 0));
}

#ifdef SUBSPACE_HAS_CUDA
std::int64_t cuda_workspace_doubles(std::int64_t adapters, std::int64_t rank, std::int64_t sb, std::int64_t sa,
                                    std::int64_t k) {
  return irls_cuda_workspace(checked_sizes(1, adapters, rank, sb, sa, k, 0));
}
#endif

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
  m.def("rank_update_cpu", &rank_update_on_cpu, py::arg("jobs"), py::arg("count"), py::arg("out_dtype"),
        py::arg("threads"));
  m.def("same_bytes", &same_bytes, py::arg("left"), py::arg("right"), py::arg("count"));
#ifdef SUBSPACE_HAS_CUDA
  m.attr("cuda_built") = true;
  m.attr("rank_update_max_rank") = kRankUpdateMaxRank;
  m.def("plan_rank_updates", &plan_rank_updates, py::arg("jobs"), py::arg("count"));
  m.def("rank_update", &rank_update, py::arg("jobs"), py::arg("device_jobs"), py::arg("count"), py::arg("blocks"),
        py::arg("tiles_per_block"), py::arg("base_dtype"), py::arg("left_dtype"), py::arg("out_dtype"),
        py::arg("stochastic"), py::arg("seed"), py::arg("stream"));
  m.def("core_grad_splits", &core_grad_splits, py::arg("tokens"), py::arg("rank"));
  m.def("core_grad", &core_grad, py::arg("g"), py::arg("g_stride"), py::arg("p"), py::arg("p_stride"),
        py::arg("dtype"), py::arg("partial"), py::arg("dc"), py::arg("tokens"), py::arg("rank"), py::arg("splits"),
        py::arg("scale"), py::arg("stream"));
  m.def("irls_cuda_workspace", &cuda_workspace_doubles, py::arg("adapters"), py::arg("rank"), py::arg("sb"),
        py::arg("sa"), py::arg("k"));
  m.def("irls_cuda", &irls_on_gpu, py::arg("rb"), py::arg("ra"), py::arg("layers"), py::arg("adapters"),
        py::arg("rank"), py::arg("sb"), py::arg("sa"), py::arg("k"), py::arg("p"), py::arg("eps"),
        py::arg("max_iter"), py::arg("tol"), py::arg("u"), py::arg("v"), py::arg("singular_values"),
        py::arg("weights"), py::arg("residuals"), py::arg("objective"), py::arg("n_iter"), py::arg("converged"),
        py::arg("workspace"), py::arg("blocks"), py::arg("stream"));
#else
  m.attr("cuda_built") = false;
#endif
}
