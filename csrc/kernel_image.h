// Whether the current device runs the kernels of this module, and which of its images.
#pragma once

#include <cstdint>
#include <string>

namespace subspace {

struct KernelImage {
  int status;                 // CUDA's error code; 0: the kernels run
  std::string message;        // what that code means
  int binary;                 // 10 x compute capability of the machine code, such as 90; 0 where none runs
  int ptx;  // of the PTX it was compiled from; the driver did that where it differs from the image's
  std::int64_t shared_bytes;  // shared memory that one block may have
};

// Loads the image on the current device; neither throws nor leaves a CUDA error behind.
KernelImage kernel_image();

}  // namespace subspace
