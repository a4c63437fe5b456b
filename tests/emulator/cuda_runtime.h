// Runs CUDA kernels on the CPU: the blocks of a launch one after another, the threads of a block as fibers that take
// turns between barriers. It stands in for the toolkit's header when csrc/cuda is compiled as plain C++, so that every
// index, mask and barrier of a kernel is exercised where there is no GPU. Between barriers one warp after another runs
// as far as it can, forwards and backwards in turn, which shows most missing barriers. It says nothing about speed.
//
// A barrier that only part of a block or warp reaches, with the rest waiting elsewhere, fails the launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::isfinite;
using std::max;
using std::min;

typedef void* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

struct cudaFuncAttributes {
  int binaryVersion, ptxVersion;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr int kSharedLimit = 163 * 1024;  // of a block on an A100
constexpr unsigned kWarp = 32;

inline int shared_limit() {
  const char* bytes = std::getenv("EMULATED_SHARED_BYTES");
  return bytes ? std::atoi(bytes) : kSharedLimit;
}

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::vector<unsigned char> stack;
  State state;
  bool started;
  dim3 index;
};

// What the lanes of a warp show each other; two sets in turn, so that one barrier an exchange is enough.
struct Exchange {
  double values[2][kWarp][6];
  unsigned turn[kWarp];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Exchange> warps;
  std::vector<unsigned char> shared;
  std::function<void()> body;
  jmp_buf scheduler;
  unsigned current;
  int any[2];
  unsigned any_turn[1024];
};

inline Block block;

inline void wait(State state) {
  Fiber& fiber = block.fibers[block.current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(block.scheduler, 1);
}

inline void enter() {
  block.body();
  block.fibers[block.current].state = State::kDone;
  _longjmp(block.scheduler, 1);
}

inline void run(unsigned number) {
  Fiber& fiber = block.fibers[number];
  block.current = number;
  threadIdx = fiber.index;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void release(unsigned first, unsigned end) {
  for (unsigned i = first; i < end; ++i) block.fibers[i].state = State::kReady;
}

inline bool all_at(State state, unsigned first, unsigned end) {
  return std::all_of(block.fibers.begin() + first, block.fibers.begin() + end,
                     [state](const Fiber& fiber) { return fiber.state == state; });
}

// Runs the lanes that can go on; false when there were none.
inline bool run_warp(unsigned first, bool forwards) {
  bool moved = false;
  for (unsigned turn = 0; turn < kWarp; ++turn) {
    const unsigned i = first + (forwards ? turn : kWarp - 1 - turn);
    if (block.fibers[i].state != State::kReady) continue;
    run(i);
    moved = true;
  }
  if (all_at(State::kAtWarp, first, first + kWarp)) release(first, first + kWarp);
  return moved;
}

// False when threads wait for others that never come.
inline bool run_block() {
  const unsigned threads = static_cast<unsigned>(block.fibers.size());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fiber.stack.resize(kStackBytes);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, reinterpret_cast<void (*)()>(enter), 0);
  }
  for (bool forwards = true;; forwards = !forwards) {
    bool moved = false;
    for (unsigned turn = 0; turn < threads / kWarp; ++turn) {
      const unsigned first = (forwards ? turn : threads / kWarp - 1 - turn) * kWarp;
      while (run_warp(first, forwards)) moved = true;
    }
    if (all_at(State::kDone, 0, threads)) return true;
    if (all_at(State::kAtBlock, 0, threads)) {
      release(0, threads);
    } else if (!moved) {
      return false;
    }
  }
}

// Every lane shows `own` [count] and gets a view of what all lanes show, element by element.
template <class Result>
double exchange(const double* own, unsigned count, Result result) {
  Exchange& warp = block.warps[block.current / kWarp];
  const unsigned lane = block.current % kWarp;
  const unsigned turn = warp.turn[lane]++ % 2;
  std::copy(own, own + count, warp.values[turn][lane]);
  wait(State::kAtWarp);
  return result(warp.values[turn]);
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::kAtBlock); }
inline void __syncwarp() { emulator::wait(emulator::State::kAtWarp); }

inline int __syncthreads_or(int value) {
  emulator::Block& block = emulator::block;
  const unsigned turn = block.any_turn[block.current]++ % 2;
  block.any[turn] |= value != 0;
  __syncthreads();
  const int result = block.any[turn];
  __syncthreads();
  block.any[turn] = 0;
  return result;
}

inline double __shfl_xor_sync(unsigned, double value, int distance) {
  const unsigned other = emulator::block.current % emulator::kWarp ^ static_cast<unsigned>(distance);
  return emulator::exchange(&value, 1, [other](const double(*shown)[6]) { return shown[other][0]; });
}

inline float __shfl_sync(unsigned, float value, int lane) {
  const double own = value;
  return static_cast<float>(
      emulator::exchange(&own, 1, [lane](const double(*shown)[6]) { return shown[lane][0]; }));
}

inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaErrorLaunchFailure: return "a barrier was not reached by all threads";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "invalid argument";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::shared_limit() ? cudaSuccess : cudaErrorInvalidValue;
}

// The environment names the card: EMULATED_CUDA_ERROR, what loading a kernel answers; EMULATED_SHARED_BYTES.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {80, 80};
  const char* error = std::getenv("EMULATED_CUDA_ERROR");
  return error ? static_cast<cudaError_t>(std::atoi(error)) : cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::shared_limit();
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(arguments...);
  emulator::Block& block = emulator::block;
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  if (threads == 0 || threads > 1024 || threads % emulator::kWarp != 0) return cudaErrorInvalidValue;
  block.fibers.resize(threads);
  block.warps.resize(threads / emulator::kWarp);
  block.body = [&] { std::apply(kernel, values); };
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(block.warps.data(), 0, block.warps.size() * sizeof(emulator::Exchange));
        std::memset(block.any, 0, sizeof(block.any));
        std::memset(block.any_turn, 0, sizeof(block.any_turn));
        // Not-a-number wherever a kernel reads shared memory that it has not written.
        block.shared.assign(config->dynamicSmemBytes, 0xFF);
        if (!emulator::run_block()) return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}
