// CUDA on the host, as much of it as csrc/cuda uses, so that g++ compiles the very same sources and the CPU runs them.
//
// The blocks of a launch run one after the other. The threads of a block are fibers on one thread of the system: each
// runs until its __syncthreads, then the next one does. Their order is rising or falling, by EMULATION_ORDER: a race
// between two barriers that shows in the results shows as a difference between the two.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// One copy for all threads of a block, as blocks never run at the same time; its contents outlive the block.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

template <class A, class B>
auto max(A a, B b) {
  return a < b ? b : a;
}
template <class A, class B>
auto min(A a, B b) {
  return b < a ? b : a;
}

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  ucontext_t context;
  unsigned thread, barriers;
  bool done;
};

struct Block {
  ucontext_t scheduler;
  Fiber* current;
  void (*body)(void*);
  void* argument;
};
inline Block block;

inline void enter() {
  block.body(block.argument);
  block.current->done = true;
  swapcontext(&block.current->context, &block.scheduler);
}

// Runs `body` once for each thread of the block that blockIdx names.
inline void run_block(unsigned threads, char* stacks, Fiber* fibers, bool falling) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.thread = t, fiber.barriers = 0, fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + t * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0;)
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[falling ? threads - 1 - i : i];
      if (fiber.done) continue;
      block.current = &fiber;
      threadIdx = dim3(fiber.thread);
      swapcontext(&block.scheduler, &fiber.context);
      left -= fiber.done;
    }
  for (unsigned t = 1; t < threads; ++t)
    if (fibers[t].barriers != fibers[0].barriers) abort();  // a barrier that not all threads have come to
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::Fiber* fiber = emulation::block.current;
  ++fiber->barriers;
  swapcontext(&fiber->context, &emulation::block.scheduler);
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  using namespace emulation;
  auto call = [&] { kernel(args...); };
  block.body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  block.argument = &call;
  gridDim = config->gridDim, blockDim = config->blockDim;
  const char* order = getenv("EMULATION_ORDER");
  const bool falling = order && strcmp(order, "falling") == 0;
  const std::unique_ptr<char[]> stacks(new char[blockDim.x * kStackBytes]);
  const std::unique_ptr<Fiber[]> fibers(new Fiber[blockDim.x]);
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(blockDim.x, stacks.get(), fibers.get(), falling);
    }
  return cudaSuccess;
}
