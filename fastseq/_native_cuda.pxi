# The CUDA kernels, a library of their own that is opened at run time. All tensors come from backends/cuda_recurrent.py
# and cuda_attention.py, outputs and work spaces too; what they mean for the kernels is in kernels.h.

cdef class CudaLibrary:
    """The library at `path`: OSError where it does not load, ImportError where it is of another build.

    emulated: it runs on the CPU, as tests build it.
    """

    cdef const Kernels* table
    cdef int memory  # the type of device that its tensors are on

    def __init__(self, str path, bint emulated=False):
        cdef bytes name = path.encode()
        cdef void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)
        cdef void* symbol = NULL if library == NULL else dlsym(library, kCudaSymbol)
        if symbol == NULL:
            raise OSError((<bytes>dlerror()).decode())
        self.table = (<CudaKernels>symbol)(kParamsBytes)
        if self.table == NULL:
            raise ImportError(f"{path} is of another build than this package")
        self.memory = kDLCPU if emulated else kDLCUDA

    def recurrent_forward(
        self, cell, x, h_0, c_0, weights, saved, y, *, h_n, c_n, c_all=None, bint read_x, batch_sizes=None,
        order=None, placed_order=None, bint packed=False, bint reverse=False, reset=None, bint float_state=False,
        uintptr_t stream
    ):
        """Fills y, h_n, c_n, c_all and `saved`, which holds W_ih x already, unless the kernel is to read x."""
        cdef Problem problem
        cdef RecurrentParams* p = &problem.params
        cdef const RecurrentKernels* kernels
        cdef Status status
        self.start(&problem, cell, x, stream)
        kernels = self.read_layer(
            &problem, x, h_0, c_0, weights, saved, batch_sizes, order, placed_order, packed, reverse, reset, float_state
        )
        if not read_x:
            p.x.data = NULL
        elif p.steps != 1:
            raise Refused(f"only a single step reads x, got {p.steps}")
        read_sequence(&p.y, required(y, "y"), "y", &problem, p.hidden_size, True)
        read_state(&p.h_n, h_n, "h_n", &problem)
        read_state(&p.c_n, c_n, "c_n", &problem)
        read_sequence(&p.c_all, c_all, "c_all", &problem, p.hidden_size, True)
        with nogil:
            status = kernels.forward(p[0])
        self.check_status(status)

    def recurrent_backward(
        self, cell, x, h_0, c_0, weights, saved, y, *, dy, dh_n, dc_n, dc_all, dh_0, dc_0, dcarry, hidden,
        batch_sizes=None, order=None, placed_order=None, bint packed=False, bint reverse=False, reset=None,
        bint float_state=False, uintptr_t stream
    ):
        """Fills dh_0, dc_0 and hidden, and turns `saved` into gradients."""
        cdef Problem problem
        cdef RecurrentParams* p = &problem.params
        cdef const RecurrentKernels* kernels
        cdef Status status
        self.start(&problem, cell, x, stream)
        kernels = self.read_layer(
            &problem, x, h_0, c_0, weights, saved, batch_sizes, order, placed_order, packed, reverse, reset, float_state
        )
        read_sequence(&p.y, required(y, "y"), "y", &problem, p.hidden_size, False)
        read_sequence(&p.dy, dy, "dy", &problem, p.hidden_size, False)
        read_sequence(&p.dc_all, dc_all, "dc_all", &problem, p.hidden_size, False)
        read_state(&p.dh_n, dh_n, "dh_n", &problem)
        read_state(&p.dc_n, dc_n, "dc_n", &problem)
        read_state(&p.dh_0, dh_0, "dh_0", &problem)
        read_state(&p.dc_0, dc_0, "dc_0", &problem)
        if problem.cell.carry:
            p.dcarry = <void*>read_weight(
                &problem.place, required(dcarry, "dcarry"), "dcarry", computes(&problem), p.batch, p.hidden_size
            )
        p.hidden = <void*>read_weight(
            &problem.place, hidden, "hidden", problem.dtype, packed_count(p), p.hidden_size
        )
        with nogil:
            status = kernels.backward(p[0])
        self.check_status(status)

    def attention_forward(
        self, call, q, k, v, bias, allowed, out, lse, *, placed, new_parts, uintptr_t stream
    ):
        """Fills out and lse. `placed` are the lengths and starts on the device; `new_parts(count)` makes work space."""
        cdef AttentionProblem problem
        cdef AttentionParams* p = &problem.params
        cdef const AttentionKernels* kernels
        cdef Status status
        cdef int64_t bytes
        self.start_attention(&problem, q, stream)
        read_attention(&problem, call, q, k, v, bias, allowed)
        self.place_lengths(&problem, placed)
        read_heads(&p.out, out, "out", &problem, p.heads, problem.q_rows, p.value_dim, problem.q_packed, True)
        p.lse = <double*>read_rows(p.lse_strides, lse, "lse", &problem)
        kernels = self.table.attention + problem.dtype
        bytes = kernels.parts_bytes(p[0])
        if bytes:
            elements = bytes // ITEM_SIZE[problem.compute_dtype]
            parts = new_parts(elements)
            p.parts = <void*>read_weight(&problem.place, parts, "parts", problem.compute_dtype, elements, -1)
        with nogil:
            status = kernels.forward(p[0])
        self.check_status(status)

    def attention_backward(
        self, call, q, k, v, bias, allowed, lse, dout, dlse, *, dq, dk, dv, dbias, delta, placed, uintptr_t stream
    ):
        """Fills dq, dk, dv and dbias, None for those not wanted; `delta` is work space like lse."""
        cdef AttentionProblem problem
        cdef AttentionParams* p = &problem.params
        cdef Status status
        self.start_attention(&problem, q, stream)
        read_attention(&problem, call, q, k, v, bias, allowed)
        self.place_lengths(&problem, placed)
        read_heads(&p.dout, dout, "dout", &problem, p.heads, problem.q_rows, p.value_dim, problem.q_packed, False)
        p.lse = <double*>read_rows(p.lse_strides, required(lse, "lse"), "lse", &problem)
        p.dlse = <const double*>read_rows(p.dlse_strides, dlse, "dlse", &problem)
        p.delta = <double*>read_rows(p.delta_strides, required(delta, "delta"), "delta", &problem)
        if dq is not None:
            read_heads(&p.dq, dq, "dq", &problem, p.heads, problem.q_rows, p.head_dim, problem.q_packed, True)
        if dk is not None:
            read_heads(&p.dk, dk, "dk", &problem, p.kv_heads, problem.k_rows, p.head_dim, problem.k_packed, True)
        if dv is not None:
            read_heads(&p.dv, dv, "dv", &problem, p.kv_heads, problem.k_rows, p.value_dim, problem.k_packed, True)
        if dbias is not None:
            self.read_bias_gradient(&problem, dbias)
        with nogil:
            status = self.table.attention[problem.dtype].backward(p[0])
        self.check_status(status)

    cdef int start_attention(self, AttentionProblem* problem, q, uintptr_t stream) except -1:
        cdef View view
        cdef Place place
        read_anywhere(q, "q", &view)
        place.type, place.index = self.memory, view.place.index
        start_attention(problem, &place, kCudaDtypes)
        problem.params.device.index, problem.params.device.stream = view.place.index, <void*>stream
        return 0

    # Lengths and starts are checked where the CPU can read them; here come their copies on the device.
    cdef int place_lengths(self, AttentionProblem* problem, placed) except -1:
        cdef AttentionParams* p = &problem.params
        lengths_q, lengths_k, starts_q, starts_k = placed
        p.q_lengths = self.place_numbers(problem, lengths_q, "lengths_q", p.q_lengths)
        p.k_lengths = self.place_numbers(problem, lengths_k, "lengths_k", p.k_lengths)
        p.q_starts = self.place_numbers(problem, starts_q, "starts_q", p.q_starts)
        p.k_starts = self.place_numbers(problem, starts_k, "starts_k", p.k_starts)
        return 0

    cdef const int64_t* place_numbers(
        self, AttentionProblem* problem, tensor, str name, const int64_t* checked
    ) except? NULL:
        if checked == NULL:
            return NULL
        name = f"placed {name}"
        return <const int64_t*>read_weight(
            &problem.place, required(tensor, name), name, INT64, problem.params.batch, -1
        )

    cdef int read_bias_gradient(self, AttentionProblem* problem, dbias) except -1:
        cdef View view
        set_bias_strides(problem, dbias.shape)
        read_at(&problem.place, dbias, "dbias", &view)
        if view.dtype != problem.compute_dtype:
            raise Refused(f"dbias must have dtype {DTYPES[problem.compute_dtype]}, got {dtype_name(&view)}")
        check_contiguous(&view, "dbias")
        problem.params.dbias = view.data
        return 0

    cdef int start(self, Problem* problem, cell, x, uintptr_t stream) except -1:
        cdef View view
        start(problem, self.table, cell, 1)
        read_anywhere(x, "x", &view)
        problem.place.type, problem.place.index, problem.dtypes = self.memory, view.place.index, kCudaDtypes
        problem.params.device.index, problem.params.device.stream = view.place.index, <void*>stream
        return 0

    # What forward and backward share. `order` is checked where the CPU can read it; `placed_order` is its copy on the
    # device.
    cdef const RecurrentKernels* read_layer(
        self, Problem* problem, x, h_0, c_0, weights, saved, batch_sizes, order, placed_order, bint packed,
        bint reverse, reset, bint float_state
    ) except NULL:
        cdef RecurrentParams* p = &problem.params
        cdef const RecurrentKernels* kernels
        cdef int64_t elements
        w_ih, w_hh, b_ih, b_hh = weights
        read_input(problem, x, h_0, c_0, batch_sizes, order, packed, reverse, reset)
        read_weights(problem, w_ih, w_hh, b_ih, b_hh)
        read_states(problem, h_0, c_0, float_state)
        if order is not None:
            p.order = <const int64_t*>read_weight(
                &problem.place, required(placed_order, "placed_order"), "placed_order", INT64, p.batch, -1
            )
        kernels = problem.cell.kernels + problem.dtype
        elements = kernels.saved_bytes(p[0]) // ITEM_SIZE[computes(problem)]
        p.saved = <void*>read_weight(
            &problem.place, required(saved, "saved"), "saved", computes(problem), elements, -1
        )
        return kernels

    cdef int check_status(self, Status status) except -1:
        if status == kCudaError:
            raise RuntimeError(f"CUDA error: {self.table.error().decode()}")
        return 0


cdef int computes(const Problem* problem) noexcept:
    return kFloat64 if problem.dtype == kFloat64 else kFloat32


cdef int64_t packed_count(const RecurrentParams* p) noexcept:
    cdef int64_t t, rows = 0
    if p.batch_sizes == NULL:
        return p.steps * p.batch
    for t in range(p.steps):
        rows += p.batch_sizes[t]
    return rows
