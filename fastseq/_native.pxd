# What _native.pyx sees of the C side: the tensor exchange of DLPack, threads.h, kernels.h and the dynamic linker.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "Python.h":
    void PyErr_SetString(object kind, const char* message)

cdef extern from "dlpack.h" nogil:
    int DLPACK_MAJOR_VERSION
    int kDLCPU, kDLCUDA, kDLInt, kDLUInt, kDLFloat, kDLBfloat, kDLBool

    ctypedef struct DLPackVersion:
        uint32_t major
    ctypedef struct DLDevice:
        int32_t device_type
        int32_t device_id
    ctypedef struct DLDataType:
        uint8_t code
        uint8_t bits
        uint16_t lanes
    ctypedef struct DLTensor:
        void* data
        DLDevice device
        int32_t ndim
        DLDataType dtype
        int64_t* shape
        int64_t* strides
        uint64_t byte_offset
    ctypedef struct DLManagedTensorVersioned:
        DLTensor dl_tensor
    ctypedef struct DLPackExchangeAPIHeader:
        DLPackVersion version
    # These functions return -1 with a Python error set.
    ctypedef struct DLPackExchangeAPI:
        DLPackExchangeAPIHeader header
        int (*managed_tensor_allocator)(
            DLTensor*, DLManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*) noexcept
        ) except -1
        int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned*, void**) except -1
        int (*dltensor_from_py_object_no_sync)(void*, DLTensor*) noexcept  # -1: with an exception set

cdef extern from "cpu/base/threads.h" namespace "fastseq" nogil:
    void* allocate(int64_t)
    void release(void*)

cdef extern from "dlfcn.h" nogil:
    int RTLD_NOW, RTLD_LOCAL
    void* dlopen(const char*, int)
    void* dlsym(void*, const char*)
    const char* dlerror()

cdef extern from "kernels.h" namespace "fastseq" nogil:
    int kFloat32, kFloat64, kBFloat16, kDtypes, kFloat16, kCudaDtypes
    ctypedef enum Status:
        kOk
        kOutOfMemory
        kCudaError
    struct Device:
        int index
        void* stream
    struct Sequence:
        void* data
        int64_t step_stride
        int64_t row_stride
    struct State:
        void* data
        int64_t row_stride
    struct RecurrentParams:
        int64_t steps, batch, input_size, hidden_size
        const int64_t* batch_sizes
        const int64_t* order
        bint packed
        bint reverse
        const uint8_t* reset
        int64_t reset_step_stride, reset_row_stride
        int threads
        Device device
        bint float_state
        const void* w_ih
        const void* w_hh
        const void* b_ih
        const void* b_hh
        const void* panels
        bint in_order
        Sequence x, y, c_all, dy, dc_all, dx
        State h_0, c_0, h_n, c_n, dh_n, dc_n, dh_0, dc_0
        void* saved
        bint accumulate_dx
        void* dw_ih
        void* dw_hh
        void* db_ih
        void* db_hh
        void* dcarry
        void* hidden
    struct RecurrentKernels:
        int64_t (*panels_bytes)(const RecurrentParams&) noexcept nogil
        int64_t (*saved_bytes)(const RecurrentParams&) noexcept nogil
        void (*pack)(const RecurrentParams&, void*) noexcept nogil
        Status (*forward)(const RecurrentParams&) noexcept nogil
        Status (*backward)(const RecurrentParams&) noexcept nogil
    struct CellKernels:
        const char* name
        int gates, states, slots, input_slot, recurrent_slot, first_gate
        bint carry
        const RecurrentKernels* kernels
    struct Heads:
        void* data
        int64_t batch_stride
        int64_t head_stride
        int64_t row_stride
    struct AttentionParams:
        int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim
        const int64_t* q_lengths
        const int64_t* k_lengths
        const int64_t* q_starts
        const int64_t* k_starts
        double scale, softcap
        int64_t left, right
        bint lower_right
        const uint8_t* allowed
        int64_t[4] allowed_strides
        const void* bias
        int64_t[4] bias_strides
        const float* alibi_slopes
        int64_t alibi_batch_stride, alibi_head_stride
        double dropout_p
        uint64_t seed
        int threads
        Device device
        Heads q, k, v, out, dout, dq, dk, dv
        double* lse
        int64_t[3] lse_strides
        const double* dlse
        int64_t[3] dlse_strides
        void* dbias
        int64_t[4] dbias_strides
        void* parts
        double* delta
        int64_t[3] delta_strides
    struct AttentionKernels:
        Status (*forward)(const AttentionParams&) noexcept nogil
        Status (*backward)(const AttentionParams&) noexcept nogil
        int64_t (*parts_bytes)(const AttentionParams&) noexcept nogil
    struct LayerNormParams:
        int64_t steps, batch, features
        double eps
        int threads
        Sequence x, residual, z, y
        const void* weight
        const void* bias
        void* mean
        void* rstd
        Sequence dy, dz, dx
        void* dweight
        void* dbias
    struct LayerNormKernels:
        Status (*forward)(const LayerNormParams&) noexcept nogil
        Status (*backward)(const LayerNormParams&) noexcept nogil
    struct LinearParams:
        int64_t steps, batch, inputs, outputs
        int threads
        const void* weight
        const void* bias
        const void* panels
        Sequence x
        void* y
    struct LinearKernels:
        int64_t (*panels_bytes)(const LinearParams&) noexcept nogil
        void (*pack)(const LinearParams&, void*) noexcept nogil
        Status (*forward)(const LinearParams&) noexcept nogil
    struct Kernels:
        const char* isa
        int vector_bytes
        const CellKernels* const* cells
        const AttentionKernels* attention
        const LayerNormKernels* layer_norm
        const LinearKernels* linear
        double (*fma_peak)(int, double) noexcept nogil
        double (*read_rate)(const void*, int64_t, int, double) noexcept nogil
        const char* (*error)() noexcept nogil
    const char* kCudaSymbol
    int64_t kParamsBytes
    ctypedef const Kernels* (*CudaKernels)(int64_t) noexcept nogil
    struct Checksum:
        uint64_t sum
        uint64_t weighted
    const Kernels* const* available_kernels()
    const Kernels* default_kernels()
    Checksum kernels_checksum "fastseq::checksum"(const void*, int64_t, int)
