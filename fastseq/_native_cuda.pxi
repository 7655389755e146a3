# The CUDA kernels, a library of their own that is opened at run time. All tensors come from backends/cuda.py, outputs
# and work spaces too; what they mean for the kernels is in kernels.h.

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
        self.table = (<CudaKernels>symbol)(sizeof(RecurrentParams))
        if self.table == NULL:
            raise ImportError(f"{path} is of another build than this package")
        self.memory = kDLCPU if emulated else kDLCUDA

    def recurrent_forward(
        self, cell, x, h_0, c_0, weights, batch_sizes, order, placed_order, bint packed, bint reverse, reset,
        bint read_x, saved, y, h_n, c_n, c_all, bint float_state, uintptr_t stream
    ):
        """Fills y, h_n, c_n, c_all and `saved`, which holds W_ih x already, unless the kernel is to read x."""
        cdef Problem problem
        cdef RecurrentParams* p = &problem.params
        cdef const RecurrentKernels* kernels
        cdef Status status
        self.start(&problem, cell, x, stream)
        kernels = self.read_layer(
            &problem, x, h_0, c_0, weights, batch_sizes, order, placed_order, packed, reverse, reset, saved, float_state
        )
        if not read_x:
            p.x.data = NULL
        elif p.steps != 1:
            raise ValueError(f"only a single step reads x, got {p.steps}")
        read_sequence(&p.y, required(y, "y"), "y", &problem, p.hidden_size, True)
        read_state(&p.h_n, h_n, "h_n", &problem)
        read_state(&p.c_n, c_n, "c_n", &problem)
        read_sequence(&p.c_all, c_all, "c_all", &problem, p.hidden_size, True)
        with nogil:
            status = kernels.forward(p[0])
        self.check_status(status)

    def recurrent_backward(
        self, cell, x, h_0, c_0, weights, batch_sizes, order, placed_order, bint packed, bint reverse, reset, saved,
        y, dy, dh_n, dc_n, dc_all, dh_0, dc_0, dcarry, hidden, bint float_state, uintptr_t stream
    ):
        """Fills dh_0, dc_0 and hidden, and turns `saved` into gradients."""
        cdef Problem problem
        cdef RecurrentParams* p = &problem.params
        cdef const RecurrentKernels* kernels
        cdef Status status
        self.start(&problem, cell, x, stream)
        kernels = self.read_layer(
            &problem, x, h_0, c_0, weights, batch_sizes, order, placed_order, packed, reverse, reset, saved, float_state
        )
        read_sequence(&p.y, required(y, "y"), "y", &problem, p.hidden_size, False)
        read_sequence(&p.dy, dy, "dy", &problem, p.hidden_size, False)
        read_sequence(&p.dc_all, dc_all, "dc_all", &problem, p.hidden_size, False)
        read_state(&p.dh_n, dh_n, "dh_n", &problem)
        read_state(&p.dc_n, dc_n, "dc_n", &problem)
        read_state(&p.dh_0, dh_0, "dh_0", &problem)
        read_state(&p.dc_0, dc_0, "dc_0", &problem)
        if problem.cell == kLstm or problem.cell == kGru:
            p.dcarry = <void*>read_weight(
                &problem.place, required(dcarry, "dcarry"), "dcarry", computes(&problem), p.batch, p.hidden_size
            )
        p.hidden = <void*>read_weight(
            &problem.place, hidden, "hidden", problem.dtype, packed_count(p), p.hidden_size
        )
        with nogil:
            status = kernels.backward(p[0])
        self.check_status(status)

    cdef int start(self, Problem* problem, cell, x, uintptr_t stream) except -1:
        cdef View view
        start(problem, cell, 1)
        read_anywhere(x, "x", &view)
        problem.place.type, problem.place.index, problem.dtypes = self.memory, view.place.index, kCudaDtypes
        problem.params.device.index, problem.params.device.stream = view.place.index, <void*>stream
        return 0

    # What forward and backward share. `order` is checked where the CPU can read it; `placed_order` is its copy on the
    # device.
    cdef const RecurrentKernels* read_layer(
        self, Problem* problem, x, h_0, c_0, weights, batch_sizes, order, placed_order, bint packed, bint reverse,
        reset, saved, bint float_state
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
        kernels = self.table.recurrent(problem.cell) + problem.dtype
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
