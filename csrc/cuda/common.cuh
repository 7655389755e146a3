// What all CUDA kernels share: types of storage and of computation, the functions of a cell, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include "kernels.h"
#include "math/step.h"

namespace fastseq::cuda {

// Types of storage: float, double, __nv_bfloat16, __half. The halves compute in float.
template <class S>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::Type;

__device__ inline float load(const float* p) { return *p; }
__device__ inline double load(const double* p) { return *p; }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ inline float load(const __half* p) { return __half2float(*p); }

__device__ inline void store(float* p, float v) { *p = v; }
__device__ inline void store(double* p, double v) { *p = v; }
__device__ inline void store(__nv_bfloat16* p, float v) { *p = __float2bfloat16_rn(v); }
__device__ inline void store(__half* p, float v) { *p = __float2half_rn(v); }

// The lane type of a thread: one value, with the functions that math/ finds by argument-dependent lookup. No fast math:
// exp and tanh are CUDA's, 2 units in the last place or better.
template <class T>
struct Lane {
  T raw;

  Lane() = default;
  __host__ __device__ constexpr Lane(T value) : raw(value) {}

  friend __host__ __device__ Lane operator+(Lane a, Lane b) { return a.raw + b.raw; }
  friend __host__ __device__ Lane operator-(Lane a, Lane b) { return a.raw - b.raw; }
  friend __host__ __device__ Lane operator*(Lane a, Lane b) { return a.raw * b.raw; }
  friend __host__ __device__ Lane operator/(Lane a, Lane b) { return a.raw / b.raw; }
  friend __host__ __device__ Lane fma(Lane a, Lane b, Lane c) { return ::fma(a.raw, b.raw, c.raw); }
  friend __host__ __device__ Lane tanh(Lane x) { return ::tanh(x.raw); }
  friend __host__ __device__ Lane sigmoid(Lane x) { return T(1) / (T(1) + ::exp(-x.raw)); }
  // max(x, 0); a NaN stays.
  friend __host__ __device__ Lane relu(Lane x) { return x.raw < T(0) ? T(0) : x.raw; }
  // 0 where the result y is <= 0, else dy (also where y is NaN, as torch).
  friend __host__ __device__ Lane relu_backward(Lane y, Lane dy) { return y.raw <= T(0) ? T(0) : dy.raw; }
  friend __host__ __device__ Lane abs(Lane x) { return ::fabs(x.raw); }
  // b where a is NaN.
  friend __host__ __device__ Lane max(Lane a, Lane b) { return a.raw > b.raw ? a.raw : b.raw; }
  friend __host__ __device__ Lane exp_vanishing(Lane x) { return ::exp(x.raw); }
  friend __host__ __device__ bool operator==(Lane a, Lane b) { return a.raw == b.raw; }
  friend __host__ __device__ Lane select(bool condition, Lane a, Lane b) { return condition ? a.raw : b.raw; }
};

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The calling thread's device for the length of a block.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : status_(cudaGetDevice(&before_)) {
    changed_ = status_ == cudaSuccess && before_ != device;
    if (changed_) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_;
  cudaError_t status_;
};

// Queues one kernel. Nothing is waited for and nothing allocated, so a stream that is being captured takes it as well.
template <class... Params, class... Args>
cudaError_t launch(const Device& device, void (*kernel)(Params...), dim3 grid, int threads, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(device.stream);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Keeps what a failed call was told, for Kernels::error.
Status status_of(cudaError_t error);

}  // namespace fastseq::cuda
