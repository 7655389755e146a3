// The table of the CUDA kernels, and the one symbol of their library.
#include "common.cuh"

namespace fastseq::cuda {

extern const RecurrentKernels kRnnTanhKernels[kCudaDtypes], kRnnReluKernels[kCudaDtypes], kLstmKernels[kCudaDtypes],
    kGruKernels[kCudaDtypes];
extern const AttentionKernels kAttentionKernels[kCudaDtypes];

namespace {

thread_local cudaError_t last_error = cudaSuccess;

const RecurrentKernels* recurrent_kernels(int cell) {
  const RecurrentKernels* const kernels[kCells] = {kRnnTanhKernels, kRnnReluKernels, kLstmKernels, kGruKernels};
  return kernels[cell];
}

const char* error() { return cudaGetErrorString(last_error); }

const Kernels kTable = {"cuda", 0, recurrent_kernels, kAttentionKernels, nullptr, nullptr, nullptr, nullptr, error};

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
