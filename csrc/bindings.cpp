// The Python face of the native code: addresses and sizes in, no mathematics. Tensors never cross; the caller keeps
// them alive until the call returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "dtype.h"
#include "irls.h"
#include "rank_update.h"
#ifdef SUBSPACE_HAS_CUDA
#include "core_grad.h"
#include "kernel_image.h"
#endif

namespace py = pybind11;
using namespace subspace;

namespace {

using Address = std::uintptr_t;
constexpr std::int64_t kMostSize = std::int64_t{1} << 24;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// A job as Python packed it; see irls.h.
IrlsJob checked_job(const py::bytes& words) {
  const std::string_view packed = words;
  SUBSPACE_CHECK(packed.size() == sizeof(IrlsJob), "irls: a job must have ", sizeof(IrlsJob), " bytes, got ",
                 packed.size());
  IrlsJob job;
  std::memcpy(&job, packed.data(), sizeof(job));
  SUBSPACE_CHECK(job.layers >= 0 && job.adapters > 0 && job.rank > 0 && job.sb > 0 && job.sa > 0 && job.max_iter >= 0,
                 "irls: sizes must be positive, got layers ", job.layers, ", adapters ", job.adapters, ", rank ",
                 job.rank, ", sb ", job.sb, ", sa ", job.sa, ", max_iter ", job.max_iter);
  // the sizes of the workspace are sums of products of two of these
  SUBSPACE_CHECK(
      job.adapters <= kMostSize && job.rank <= kMostSize / job.adapters && job.sb <= kMostSize && job.sa <= kMostSize,
      "irls: adapters x rank, sb and sa must be at most ", kMostSize, ", got ", job.adapters, " x ", job.rank, ", ",
      job.sb, ", ", job.sa);
  SUBSPACE_CHECK(job.k >= 1 && job.k <= job.sb && job.k <= job.sa, "irls: k must be in 1..min(sb, sa), got k ", job.k,
                 ", sb ", job.sb, ", sa ", job.sa);
  SUBSPACE_CHECK(job.model == IrlsModel::kMean || job.model == IrlsModel::kShared, "irls: model must be 0 or 1, got ",
                 static_cast<std::int64_t>(job.model));
  return job;
}

// For what runs the job, which has a workspace then.
IrlsJob checked_workers(const py::bytes& words) {
  const IrlsJob job = checked_job(words);
  SUBSPACE_CHECK(job.workers >= 1, "irls: workers must be at least 1, got ", job.workers);
  return job;
}

void irls(const py::bytes& words) {
  const IrlsJob job = checked_workers(words);
  py::gil_scoped_release unlocked;
  irls_cpu(job);
}

DType checked_dtype(const char* name, int code) {
  SUBSPACE_CHECK(code >= 0 && code <= 2, name, ": dtype code must be 0, 1 or 2, got ", code);
  return static_cast<DType>(code);
}

// The host array at an address.
RankUpdate* checked_updates(Address jobs, std::int64_t count) {
  auto* array = at<RankUpdate>(jobs);
  for (std::int64_t i = 0; i < count; ++i) {
    SUBSPACE_CHECK(array[i].rows >= 0 && array[i].columns >= 0 && array[i].rank >= 0,
                   "rank_update: sizes must not be negative, got rows ", array[i].rows, ", columns ", array[i].columns,
                   ", rank ", array[i].rank, " in job ", i);
  }
  return array;
}

void rank_update_on_cpu(Address jobs, std::int64_t count, int out_dtype, std::int64_t threads) {
  SUBSPACE_CHECK(threads >= 1, "rank_update: threads must be at least 1, got ", threads);
  const RankUpdate* array = checked_updates(jobs, count);
  const DType out = checked_dtype("rank_update", out_dtype);
  py::gil_scoped_release unlocked;
  rank_update_cpu(array, count, out, threads);
}

bool same_bytes(Address left, Address right, std::int64_t count) {
  SUBSPACE_CHECK(count >= 0, "same_bytes: count must not be negative, got ", count);
  return std::memcmp(at<const void>(left), at<const void>(right), static_cast<std::size_t>(count)) == 0;
}

#ifdef SUBSPACE_HAS_CUDA
void irls_on_gpu(const py::bytes& words, Address stream) {
  const IrlsJob job = checked_workers(words);
  py::gil_scoped_release unlocked;
  irls_cuda(job, at<void>(stream));
}

py::dict image() {
  const KernelImage found = kernel_image();
  py::dict fields;
  fields["status"] = found.status;
  fields["message"] = found.message;
  fields["binary"] = found.binary;
  fields["ptx"] = found.ptx;
  fields["max_rank"] = rank_update_max_rank(found.shared_bytes);
  return fields;
}

// jobs: address of the host array, whose first_block words are set here.
py::tuple plan_rank_updates(Address jobs, std::int64_t count) {
  const RankUpdatePlan plan = rank_update_plan(checked_updates(jobs, count), count);
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
               Address dc, std::int64_t tokens, std::int64_t rank, std::int64_t splits, double scale, Address stream) {
  SUBSPACE_CHECK(tokens >= 0 && rank >= 0, "core_grad: sizes must not be negative, got tokens ", tokens, ", rank ",
                 rank);
  const CoreGrad arguments{at<const void>(g),
                           g_stride,
                           at<const void>(p),
                           p_stride,
                           checked_dtype("core_grad", dtype),
                           at<float>(partial),
                           at<float>(dc),
                           tokens,
                           rank,
                           splits,
                           static_cast<float>(scale)};
  py::gil_scoped_release unlocked;
  core_grad_cuda(arguments, at<void>(stream));
}
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = SUBSPACE_VERSION;
  info["compiler"] = SUBSPACE_COMPILER;
#ifdef _MSVC_LANG
  constexpr long long standard = _MSVC_LANG;  // __cplusplus stays at 1997 there
#else
  constexpr long long standard = __cplusplus;
#endif
  info["cpp_standard"] = standard / 100 % 100;
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

// Nothing here keeps state between calls, so free-threaded Python need not turn its lock on.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of subspace_ext; addresses are integers, sizes and strides count elements.";
  m.def("build_info", &build_info);
  m.def("irls_workspace", [](const py::bytes& job) { return irls_workspace(checked_job(job)); }, py::arg("job"));
  m.def("irls", &irls, py::arg("job"));
  m.def("rank_update_cpu", &rank_update_on_cpu, py::arg("jobs"), py::arg("count"), py::arg("out_dtype"),
        py::arg("threads"));
  m.def("same_bytes", &same_bytes, py::arg("left"), py::arg("right"), py::arg("count"));
#ifdef SUBSPACE_HAS_CUDA
  m.attr("cuda_built") = true;
  m.def("kernel_image", &image);
  m.def("plan_rank_updates", &plan_rank_updates, py::arg("jobs"), py::arg("count"));
  m.def("rank_update", &rank_update, py::arg("jobs"), py::arg("device_jobs"), py::arg("count"), py::arg("blocks"),
        py::arg("tiles_per_block"), py::arg("base_dtype"), py::arg("left_dtype"), py::arg("out_dtype"),
        py::arg("stochastic"), py::arg("seed"), py::arg("stream"));
  m.def("core_grad_splits", &core_grad_splits, py::arg("tokens"), py::arg("rank"));
  m.def("core_grad", &core_grad, py::arg("g"), py::arg("g_stride"), py::arg("p"), py::arg("p_stride"), py::arg("dtype"),
        py::arg("partial"), py::arg("dc"), py::arg("tokens"), py::arg("rank"), py::arg("splits"), py::arg("scale"),
        py::arg("stream"));
  m.def(
      "irls_cuda_workspace", [](const py::bytes& job) { return irls_cuda_workspace(checked_job(job)); },
      py::arg("job"));
  m.def("irls_cuda", &irls_on_gpu, py::arg("job"), py::arg("stream"));
#else
  m.attr("cuda_built") = false;
#endif
}
