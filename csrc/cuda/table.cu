// The table of the CUDA kernels, and the one symbol of their library.
#include "cell_facts.h"
#include "cuda/common.cuh"

namespace fastseq::cuda {

namespace cells {
#define CELL(name, header, functor) extern const CellKernels name;
#include "cells.def"
#undef CELL
}  // namespace cells

extern const AttentionKernels kAttentionKernels[kCudaDtypes];

namespace {

thread_local cudaError_t last_error = cudaSuccess;

constexpr const CellKernels* kCells[] = {
#define CELL(name, header, functor) &cells::name,
#include "cells.def"
#undef CELL
    nullptr};

const char* error() { return cudaGetErrorString(last_error); }

const Kernels kTable = {"cuda", 0, kCells, kAttentionKernels, nullptr, nullptr, nullptr, nullptr, error};

}  // namespace

Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return kOk;
  last_error = error;
  return kCudaError;
}

}  // namespace fastseq::cuda

extern "C" __attribute__((visibility("default"))) const fastseq::Kernels* fastseq_cuda_kernels(int64_t params_bytes) {
  return params_bytes == fastseq::kParamsBytes ? &fastseq::cuda::kTable : nullptr;
}
