// Element types that cross the Python boundary; the numbers are those of subspace_ext/_native.py.
#pragma once

namespace subspace {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace subspace
