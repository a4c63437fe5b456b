#include "kernel_image.h"

#include <cuda_runtime.h>

namespace subspace {
namespace {

// Compiled for the same cards as the kernels that are used.
__global__ void probe_kernel() {}

}  // namespace

KernelImage kernel_image() {
  cudaFuncAttributes attributes = {};
  int device = 0, shared_bytes = 0;
  cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status != cudaSuccess) {
    cudaGetLastError();
    return {static_cast<int>(status), cudaGetErrorString(status), 0, 0, 0};
  }
  return {0, "", attributes.binaryVersion, attributes.ptxVersion, shared_bytes};
}

}  // namespace subspace
