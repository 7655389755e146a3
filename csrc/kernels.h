// All that the bindings see of the kernels: parameter structs and one table of functions per instruction set (ISA), and
// one for CUDA. No torch, no Python, no std types: plain pointers, sizes and strides.
#pragma once

#include <cstdint>

namespace fastseq {

enum Dtype : int { kFloat32, kFloat64, kBFloat16, kDtypes, kFloat16 = kDtypes, kCudaDtypes };  // float16: CUDA only
enum Status : int { kOk, kOutOfMemory, kCudaError };  // the last: Kernels::error tells which

// CUDA only: where a call runs. Pointers of its params are to the memory of this device, unless they say otherwise.
struct Device {
  int index;
  void* stream;  // cudaStream_t
};

// Rows of a sequence tensor; the last axis is contiguous, strides count elements.
// Padded (T, B, N): row (t, b) is data + t * step_stride + b * row_stride, for any two strides.
// Packed (sum of batch_sizes, N): row r is data + r * row_stride, step_stride is unused.
struct Sequence {
  void* data;  // null: absent (an optional input is zero, an optional output is not wanted)
  int64_t step_stride;
  int64_t row_stride;
};

// A state (B, H); the last axis is contiguous. Null: absent, as above.
struct State {
  void* data;
  int64_t row_stride;
};

// One layer in one direction. G is the number of gates: 1, 4 or 3, in torch's order (i f g o; r z n).
// Storage is float32, float64, bfloat16 or, on CUDA, float16; the last two compute in float32.
// No output may overlap an input, except `d` buffers as noted.
//
// CUDA runs the loop over the steps. What spans them all is the caller's, as products of matrices: x W_ih^T before
// forward, dx, dw_ih, dw_hh, db_ih and db_hh after backward; those five are not read. With R the sum of batch_sizes (or
// T * B), row sum(batch_sizes[:t]) + b being that of step t, and C the type of computation, `saved` holds in C
//   (R, slots, H)  the slots of math/step.h. Into forward: W_ih x, without bias, from kInputSlot on. Out of forward:
//                  what backward needs. Out of backward: the gradients.
//   (R, H)         the carry after each step; not for cells without one
struct RecurrentParams {
  int64_t steps, batch, input_size, hidden_size;  // T B I H, each >= 1

  // Variable length. Rows are numbered by falling length: row b is active at the steps t with b < batch_sizes[t].
  const int64_t* batch_sizes;  // (T) not increasing, batch_sizes[0] <= B, batch_sizes[T-1] >= 1; null: all rows always.
                               // CUDA: in the memory of the host
  const int64_t* order;        // (B) the batch index of row b in every padded tensor and state; null: b
  bool packed;                 // the sequences are packed (needs batch_sizes): row r = sum(batch_sizes[:t]) + b
  bool reverse;                // from the last step to the first

  // Segment cuts: true at (t, b) zeroes the state between the steps t - 1 and t. Null: none. Strides count bytes.
  const uint8_t* reset;  // (T, B), indexed by t and by batch index; also cuts the initial state at t = 0
  int64_t reset_step_stride, reset_row_stride;

  int threads;       // at most this many; CPU only
  Device device;     // CUDA only
  bool float_state;  // bfloat16 only: h_0, c_0, h_n, c_n, dh_n, dc_n, dh_0, dc_0 are float32

  // Weights as torch lays them out, contiguous: w_ih (G*H, I), w_hh (G*H, H), b_ih and b_hh (G*H) or both null.
  const void *w_ih, *w_hh, *b_ih, *b_hh;
  const void* panels;  // what `pack` wrote; null: forward reads the weights in place (meant for few rows)
  bool in_order;       // in place, of a single row (T * B = 1): with the bits of panels, at half the speed

  Sequence x;      // (T, B, I). CUDA: null, or with T = 1 forward computes W_ih x itself
  State h_0, c_0;  // (B, H); c_0 for LSTM only
  Sequence y;      // (T, B, H); an output of forward, an input of backward. Inactive rows are not written
  State h_n, c_n;  // (B, H); may be null. A row of length 0 gets its h_0 and c_0
  Sequence c_all;  // (T, B, H) every cell state, LSTM only; may be null
  void* saved;     // `saved_bytes`, 64-byte aligned; written by forward for backward, null: inference (not on CUDA).
                   // backward destroys it (it turns the saved gates into their gradients in place)

  // backward only
  Sequence dy, dc_all;  // null: zero
  State dh_n, dc_n;     // null: zero
  Sequence dx;          // (T, B, I), null: not wanted. Inactive rows are not written
  bool accumulate_dx;   // add to dx instead of writing it (the second direction of a layer)
  State dh_0, dc_0;     // null: not wanted
  void *dw_ih, *dw_hh;  // (G*H, I), (G*H, H) contiguous, null: not wanted
  void *db_ih, *db_hh;  // (G*H), null: not wanted
  void* dcarry;         // CUDA only: (B, H) in C, work space; null for cells without a carry
  void* hidden;  // CUDA only: (R, H), an output: h before each step, which dw_hh is a product with; null: not wanted
};

struct RecurrentKernels {
  int64_t (*panels_bytes)(const RecurrentParams&);     // reads I, H; null on CUDA, as pack
  int64_t (*saved_bytes)(const RecurrentParams&);      // reads T, B, H, batch_sizes
  void (*pack)(const RecurrentParams&, void* panels);  // reads I, H, threads, weights; panels 64-byte aligned
  Status (*forward)(const RecurrentParams&);
  Status (*backward)(const RecurrentParams&);
};

// One cell of cells.def: its kernels, and what their callers must know of it.
struct CellKernels {
  const char* name;
  int gates;   // blocks of H rows in the weights, in torch's order
  int states;  // beside h: 0, or 1 (c)
  // How `saved` is divided on CUDA: the slots of math/step.h, and the gate in the first slot of the input; the others
  // follow cyclically. Slots of the recurrence are in the order of the gates.
  int slots, input_slot, recurrent_slot, first_gate;
  bool carry;
  const RecurrentKernels* kernels;  // kDtypes entries; CUDA: kCudaDtypes
};

// The heads of a sequence tensor, (B, N, L, D) by strides in elements; the last axis is contiguous.
struct Heads {
  void* data;  // null: absent, as above
  int64_t batch_stride, head_stride, row_stride;
};

// Scaled-dot-product attention. N query heads, Nk heads of keys and values: query head n uses head n / (N / Nk).
//
//   s = scale * <q_i, k_j>, then softcap * tanh(s / softcap), + bias, - slope * |i + shift - j|, in this order
//   p = softmax of s over the keys j that query i may see, out_i = sum_j dropout(p)_ij v_j
//
// A query that may see no key, or whose scores are all -inf, has p = 0, out = 0 and lse = -inf.
// No output may overlap an input.
struct AttentionParams {
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;  // B N Nk L S D E; L and S of the longest row

  // Variable length: batch row b has q_lengths[b] queries from row q_starts[b] of its tensors on; null: L, and 0.
  // Packed batches have starts, and batch strides of 0. Without starts, rows of outputs beyond the length become 0
  // (those of lse -inf); with starts they are not written.
  const int64_t *q_lengths, *k_lengths, *q_starts, *k_starts;  // (B)

  double scale, softcap;  // softcap 0: none
  int64_t left, right;    // query i may see the keys j with -left <= j - (i + shift) <= right; INT64_MAX: all
  bool lower_right;       // shift is the number of keys less that of queries; otherwise 0

  // Query i may see key j where `allowed` is true. Masks are (B, N, L, S) by strides, 0 for broadcast axes.
  const uint8_t* allowed;  // null: everywhere
  int64_t allowed_strides[4];
  const void* bias;  // in the dtype of the query; null: 0
  int64_t bias_strides[4];
  const float* alibi_slopes;  // (B, N); null: 0
  int64_t alibi_batch_stride, alibi_head_stride;

  double dropout_p;  // in [0, 1): draws are those of math/philox.h
  uint64_t seed;
  int threads;    // at most this many; CPU only
  Device device;  // CUDA only; masks, lengths and starts are in its memory, too

  Heads q, k, v, out;
  // (B, N, L), log of the sum of exp(s); null: not wanted, backward needs it. In double: exp(s - lse) errs by as much
  // as lse does, and a float of 500 errs by 250 times what a probability should.
  double* lse;
  int64_t lse_strides[3];
  void* parts;  // CUDA only, forward: `parts_bytes` of work space

  // backward only
  Heads dout, dq, dk, dv;  // null: not wanted
  const double* dlse;      // null: 0
  int64_t dlse_strides[3];
  void* dbias;  // the gradient of bias, float32 or float64; null: not wanted
  int64_t dbias_strides[4];
  double* delta;  // CUDA only: work space like lse
  int64_t delta_strides[3];
};

struct AttentionKernels {
  Status (*forward)(const AttentionParams&);
  Status (*backward)(const AttentionParams&);
  int64_t (*parts_bytes)(const AttentionParams&);  // reads B N Nk L S E; null on the CPU
};

// Layer normalization of the rows of z = x + residual: y = (z - mean) / sqrt(variance + eps) * weight + bias.
// No output may overlap an input.
struct LayerNormParams {
  int64_t steps, batch, features;  // each >= 1; (T, B, N) of every sequence
  double eps;
  int threads;  // at most this many

  Sequence x, residual;       // residual null: z is x
  Sequence z;                 // written by forward beside a residual, null: not wanted; read by backward (without: x)
  const void *weight, *bias;  // (N) contiguous; null: 1 and 0
  Sequence y;
  void *mean, *rstd;  // (T, B) contiguous, float32 or float64; written by forward for backward, null: not wanted

  // backward only
  Sequence dy;
  Sequence dz;            // the gradient of z from elsewhere; null: 0
  Sequence dx;            // that of x and of the residual; null: not wanted
  void *dweight, *dbias;  // (N), null: not wanted
};

struct LayerNormKernels {
  Status (*forward)(const LayerNormParams&);
  Status (*backward)(const LayerNormParams&);
};

// A product of the rows of x with packed weights: y = x W^T + bias.
struct LinearParams {
  int64_t steps, batch, inputs, outputs;  // each >= 1; (T, B, K) and (T, B, N)
  int threads;                            // at most this many
  const void *weight, *bias;              // (N, K) and (N), contiguous; bias null: 0
  const void* panels;                     // what `pack` wrote
  Sequence x;
  void* y;  // (T, B, N) contiguous; no overlap with x
};

struct LinearKernels {
  int64_t (*panels_bytes)(const LinearParams&);     // reads K, N
  void (*pack)(const LinearParams&, void* panels);  // reads K, N, threads, weight, bias; panels 64-byte aligned
  Status (*forward)(const LinearParams&);           // reads all but weight and bias
};

struct Kernels {
  const char* isa;  // "baseline", "avx2", "avx512", "avx512_bf16"; "cuda"
  int vector_bytes;
  const CellKernels* const* cells;                // in the order of cells.def, then null
  const AttentionKernels* attention;              // kDtypes entries; CUDA: kCudaDtypes
  const LayerNormKernels* layer_norm;             // kDtypes entries; null on CUDA
  const LinearKernels* linear;                    // kDtypes entries; null on CUDA
  double (*fma_peak)(int dtype, double seconds);  // measured flops per second of one core at full FMA rate; CPU only
  // Measured bytes per second at which a team reads a buffer, over and over. CPU only.
  double (*read_rate)(const void* data, int64_t bytes, int threads, double seconds);
  const char* (*error)();  // CUDA only: what this thread's last kCudaError was
};

// The tables of the ISAs that run on this machine, worst first, then null.
const Kernels* const* available_kernels();
// The best of them, or the one that FASTSEQ_ISA, read once, names; null if it names none of them.
const Kernels* default_kernels();

// The CUDA kernels are a library of their own, which is opened at run time; this is what it exports. `params_bytes` is
// kParamsBytes there, null for a library that was built from another kernels.h.
constexpr char kCudaSymbol[] = "fastseq_cuda_kernels";
constexpr int64_t kParamsBytes = sizeof(RecurrentParams) + sizeof(AttentionParams);
using CudaKernels = const Kernels* (*)(int64_t params_bytes);

// Two 64-bit words that depend on every byte of a buffer and on its place. Finds a changed weight, not an adversary.
struct Checksum {
  uint64_t sum, weighted;
};
Checksum checksum(const void* data, int64_t bytes, int threads);

}  // namespace fastseq
