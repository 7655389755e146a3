# Recurrent layers in one direction: tensors in, one kernel call, tensors out.

cdef class Panels:
    """Weights of one cell, packed for one instruction set."""

    cdef void* memory
    cdef const Kernels* table
    cdef const CellKernels* cell
    cdef int dtype
    cdef int64_t input_size, hidden_size
    cdef readonly int64_t nbytes

    def __dealloc__(self):
        release(self.memory)

    @property
    def isa(self):
        """The instruction set they were packed for; the only one that can read them."""
        return self.table.isa.decode()


def pack(cell, weights, int threads):
    """The weights packed for the active instruction set."""
    cdef Problem problem
    cdef View view
    cdef const RecurrentKernels* kernels
    cdef Panels panels = Panels.__new__(Panels)
    w_ih, w_hh, b_ih, b_hh = weights
    start(&problem, active, cell, threads)
    read(w_ih, "w_ih", &view)
    check_float(&view, "w_ih", 2)
    problem.dtype = view.dtype
    problem.params.input_size = view.shape[1]
    read_weights(&problem, w_ih, w_hh, b_ih, b_hh)
    kernels = problem.cell.kernels + problem.dtype
    panels.table, panels.cell, panels.dtype = active, problem.cell, problem.dtype
    panels.input_size, panels.hidden_size = problem.params.input_size, problem.params.hidden_size
    panels.nbytes = kernels.panels_bytes(problem.params)
    panels.memory = allocate(panels.nbytes)
    if panels.memory == NULL:
        raise MemoryError(f"no memory for {panels.nbytes} bytes of packed weights")
    with nogil:
        kernels.pack(problem.params, panels.memory)
    return panels


def recurrent_forward(
    cell, x, h_0, c_0, weights, *, Panels panels=None, batch_sizes=None, order=None, bint packed=False,
    bint reverse=False, reset=None, bint save=False, y=None, bint return_c=False, bint float_state=False,
    bint leading=False
):
    """A whole sequence: (y, h_n, c_n, c_all, saved).

    Args:
        x: (T, B, I), or the rows (sum of batch_sizes, I) of a packed sequence with `packed`.
        h_0, c_0: (B, H) or None for zeros; c_0 for the LSTM. dtype of x, or float32 with `float_state`.
        panels: `pack(cell, weights)`, made with the active instruction set. None: the weights are packed for this
            call, or read in place for a single row. The bits are the same.
        batch_sizes: int64 (T,), the number of rows active at each step: falling, at least 1. None: all, always.
        order: int64 (B,), the batch index of each row when rows are sorted by falling length. None: sorted already.
        reverse: from the last step to the first.
        reset: bool (T, B), True zeroes the state between the steps t - 1 and t.
        save: keep what `recurrent_backward` needs, as an opaque tensor.
        y: (T, B, H) to write into; its padding is not written. None: a new one, zero at padding.
        return_c: the LSTM's c of all steps as well, (T, B, H), zero at padding.
        float_state: of bfloat16, keep the states that come in and go out in float32.
        leading: states are (1, B, H), those that come in and those that go out: a view less for one of several.
    """
    cdef Problem problem
    cdef RecurrentParams* p = &problem.params
    cdef const RecurrentKernels* kernels
    cdef Status status
    c_n = c_all = saved = None
    w_ih, w_hh, b_ih, b_hh = weights
    start(&problem, active, cell, count_threads())
    problem.leading = leading
    read_input(&problem, x, h_0, c_0, batch_sizes, order, packed, reverse, reset)
    read_weights(&problem, w_ih, w_hh, b_ih, b_hh)
    read_states(&problem, h_0, c_0, float_state)
    use_panels(&problem, panels)
    kernels = problem.cell.kernels + problem.dtype
    if y is None:
        y = empty_sequence(&p.y, &problem, p.hidden_size)
    else:
        read_sequence(&p.y, y, "y", &problem, p.hidden_size, True)
    h_n = empty_state(&p.h_n, &problem)
    if problem.cell.states:
        c_n = empty_state(&p.c_n, &problem)
        if return_c:
            c_all = empty_sequence(&p.c_all, &problem, p.hidden_size)
    if save:
        saved = empty(&p.saved, UINT8, (kernels.saved_bytes(p[0]),))
        check_aligned(p.saved)
    with nogil:
        status = forward_sequence(kernels, p)
    check_status(status)
    return y, h_n, c_n, c_all, saved


def recurrent_step(
    cell, x, h, c, w_ih, w_hh, b_ih, b_hh, int threads, bint save=False, Panels panels=None, bint float_state=False
):
    """(y, h_n, c_n, saved) of one step; h_n is y itself unless float_state."""
    cdef Problem problem
    cdef RecurrentParams* p = &problem.params
    cdef const RecurrentKernels* kernels
    cdef View view
    cdef Status status
    h_n = c_n = saved = None
    start(&problem, active, cell, threads)
    read(x, "x", &view)
    check_float(&view, "x", 2)
    check_unit_stride(&view, "x")
    problem.dtype = view.dtype
    p.steps, p.batch, p.input_size = 1, view.shape[0], view.shape[1]
    p.x.data, p.x.row_stride = view.data, view.stride[0]
    read_weights(&problem, w_ih, w_hh, b_ih, b_hh)
    read_states(&problem, h, c, float_state)
    use_panels(&problem, panels)
    kernels = problem.cell.kernels + problem.dtype
    y = empty_step(&p.y.data, &problem, problem.dtype)
    p.y.row_stride = p.hidden_size
    if float_state:
        h_n = empty_step(&p.h_n.data, &problem, problem.state_dtype)
        p.h_n.row_stride = p.hidden_size
    if problem.cell.states:
        c_n = empty_step(&p.c_n.data, &problem, problem.state_dtype)
        p.c_n.row_stride = p.hidden_size
    if save:
        saved = empty(&p.saved, UINT8, (kernels.saved_bytes(p[0]),))
        check_aligned(p.saved)
    with nogil:
        status = kernels.forward(p[0])
    check_status(status)
    return y, h_n if float_state else y, c_n, saved


def recurrent_backward(
    cell, x, h_0, c_0, weights, y, saved, isa, *, dy, dh_n, dc_n, dc_all, needs, batch_sizes=None, order=None,
    bint packed=False, bint reverse=False, reset=None, bint float_state=False, bint leading=False, dx=None,
    bint accumulate_dx=False
):
    """The gradients (dx, dh_0, dc_0, dw_ih, dw_hh, db_ih, db_hh), None where `needs` says so.

    Destroys `saved`: a second call needs another `recurrent_forward(save=True)` first.

    Args:
        y, saved: what `recurrent_forward` returned for the same arguments.
        isa: the instruction set that it ran with.
        dy, dh_n, dc_n, dc_all: gradients of y, h_n, c_n and c_all; None for zero.
        needs: seven bools, in the order of the result.
        dx: (T, B, I) to write into, or to add to with `accumulate_dx`; its padding is not written.
    """
    cdef Problem problem
    cdef RecurrentParams* p = &problem.params
    cdef const RecurrentKernels* kernels
    cdef View view
    cdef Status status
    cdef int64_t rows
    dh_0 = dc_0 = dw_ih = dw_hh = db_ih = db_hh = None
    w_ih, w_hh, b_ih, b_hh = weights
    needs_x, needs_h_0, needs_c_0, needs_w_ih, needs_w_hh, needs_b_ih, needs_b_hh = needs
    start(&problem, active, cell, count_threads())
    problem.leading = leading
    read_input(&problem, x, h_0, c_0, batch_sizes, order, packed, reverse, reset)
    read_weights(&problem, w_ih, w_hh, b_ih, b_hh)
    read_states(&problem, h_0, c_0, float_state)
    kernels = table_of(isa).cells[place_of(cell)].kernels + problem.dtype
    read_sequence(&p.y, required(y, "y"), "y", &problem, p.hidden_size, False)
    read(saved, "saved", &view)
    check(&view, "saved", UINT8, kernels.saved_bytes(p[0]), -1, -1)
    check_contiguous(&view, "saved")
    p.saved = view.data
    if <uintptr_t>p.saved % 64:  # memory of a saved-tensor hook
        saved = empty(&p.saved, UINT8, (view.shape[0],))
        memcpy(p.saved, view.data, view.shape[0])
    check_aligned(p.saved)
    read_sequence(&p.dy, dy, "dy", &problem, p.hidden_size, False)
    read_state(&p.dh_n, dh_n, "dh_n", &problem)
    if problem.cell.states:
        read_state(&p.dc_n, dc_n, "dc_n", &problem)
        read_sequence(&p.dc_all, dc_all, "dc_all", &problem, p.hidden_size, False)

    if dx is not None:
        read_sequence(&p.dx, dx, "dx", &problem, p.input_size, True)
        p.accumulate_dx = accumulate_dx
    elif needs_x:
        dx = empty_sequence(&p.dx, &problem, p.input_size)
    rows = problem.cell.gates * p.hidden_size
    if needs_h_0:
        dh_0 = empty_state(&p.dh_0, &problem)
    if needs_c_0 and problem.cell.states:
        dc_0 = empty_state(&p.dc_0, &problem)
    if needs_w_ih:
        dw_ih = empty(&p.dw_ih, problem.dtype, (rows, p.input_size))
    if needs_w_hh:
        dw_hh = empty(&p.dw_hh, problem.dtype, (rows, p.hidden_size))
    if needs_b_ih and b_ih is not None:
        db_ih = empty(&p.db_ih, problem.dtype, (rows,))
    if needs_b_hh and b_hh is not None:
        db_hh = empty(&p.db_hh, problem.dtype, (rows,))
    with nogil:
        status = kernels.backward(p[0])
    check_status(status)
    return dx, dh_0, dc_0, dw_ih, dw_hh, db_ih, db_hh


# A sequence can be cut anywhere without a change of a bit, down to one step of one row, which is not worth packing for.
cdef Status forward_sequence(const RecurrentKernels* kernels, RecurrentParams* p) noexcept nogil:
    cdef void* scratch = NULL
    cdef Status status
    p.in_order = p.panels == NULL and p.steps * p.batch == 1
    if p.panels == NULL and not p.in_order:
        scratch = allocate(kernels.panels_bytes(p[0]))
        if scratch == NULL:
            return kOutOfMemory
        kernels.pack(p[0], scratch)
        p.panels = scratch
    status = kernels.forward(p[0])
    release(scratch)
    return status


cdef int check_status(Status status) except -1:
    if status != kOk:
        raise MemoryError("no memory for the work space of the kernel")
    return 0


cdef int check_aligned(const void* memory) except -1:
    if <uintptr_t>memory % 64:
        raise Refused("saved must be 64-byte aligned")
    return 0


cdef required(tensor, str name):
    if tensor is None:
        raise Refused(f"{name} must be a tensor, got None")
    return tensor


# ---- filling the params


cdef int start(Problem* problem, const Kernels* table, cell, int threads) except -1:
    memset(problem, 0, sizeof(Problem))
    problem.cell = table.cells[place_of(cell)]
    problem.place, problem.dtypes = CPU, kDtypes
    problem.params.threads = threads if threads > 1 else 1
    return 0


cdef int read_input(
    Problem* problem, x, h_0, c_0, batch_sizes, order, bint packed, bint reverse, reset
) except -1:
    cdef RecurrentParams* p = &problem.params
    cdef View view, sizes
    p.packed, p.reverse = packed, reverse
    read_at(&problem.place, x, "x", &view)
    check_float(&view, "x", 2 if packed else 3, problem.dtypes)
    problem.dtype = view.dtype
    p.steps, p.batch, p.input_size = view.shape[0], view.shape[1], view.shape[view.dims - 1]
    if batch_sizes is not None:
        read(batch_sizes, "batch_sizes", &sizes)
        if packed:
            # The batch is that of the states: rows of length 0 are in none of the batch sizes.
            p.steps, p.batch = sizes.shape[0], rows_of(h_0, c_0, order, problem.leading)
        check(&sizes, "batch_sizes", INT64, p.steps, -1, -1)
        check_contiguous(&sizes, "batch_sizes")
        p.batch_sizes = <const int64_t*>sizes.data
        if p.batch == 0 and p.steps > 0:
            p.batch = p.batch_sizes[0]
        problem.rows = check_batch_sizes(p)
    elif packed:
        raise Refused("a packed sequence needs batch_sizes")
    read_sequence(&p.x, x, "x", problem, p.input_size, False)
    if order is not None:
        read_order(p, order)
    if reset is not None:
        read_at(&problem.place, reset, "reset", &view)
        check(&view, "reset", BOOL, p.steps, p.batch, -1)
        p.reset, p.reset_step_stride, p.reset_row_stride = <const uint8_t*>view.data, view.stride[0], view.stride[1]
    return 0


# The number of rows of the first that is there, 0 if none is.
cdef int64_t rows_of(h_0, c_0, order, bint leading) except -1:
    cdef View view
    for tensor, name in ((h_0, "h_0"), (c_0, "c_0"), (order, "order")):
        if tensor is not None:
            read_anywhere(tensor, name, &view)
            if view.dims == 0:
                raise Refused(f"{name} must not be a scalar")
            return view.shape[1 if leading and view.dims == 3 else 0]
    return 0


# Returns their sum, the number of rows of the packed sequence.
cdef int64_t check_batch_sizes(const RecurrentParams* p) except -1:
    cdef int64_t above = p.batch
    cdef int64_t rows = 0
    cdef int64_t t
    for t in range(p.steps):
        if p.batch_sizes[t] < 1 or p.batch_sizes[t] > above:
            raise Refused(f"batch_sizes must not increase and lie in [1, {p.batch}], got {p.batch_sizes[t]} at {t}")
        above = p.batch_sizes[t]
        rows += above
    return rows


cdef int read_order(RecurrentParams* p, order) except -1:
    cdef View view
    cdef int64_t b, index
    cdef uint8_t* taken
    read(order, "order", &view)
    check(&view, "order", INT64, p.batch, -1, -1)
    check_contiguous(&view, "order")
    p.order = <const int64_t*>view.data
    taken = <uint8_t*>calloc(p.batch, 1)
    if taken == NULL:
        raise MemoryError("no memory to check order")
    try:
        for b in range(p.batch):
            index = p.order[b]
            if index < 0 or index >= p.batch or taken[index]:
                raise Refused(f"order must be a permutation of 0 .. {p.batch - 1}, got {index} at {b}")
            taken[index] = 1
    finally:
        free(taken)
    return 0


cdef int read_weights(Problem* problem, w_ih, w_hh, b_ih, b_hh) except -1:
    cdef RecurrentParams* p = &problem.params
    cdef View view
    cdef int64_t rows
    read_at(&problem.place, w_hh, "w_hh", &view)
    if view.dims != 2 or view.shape[1] < 1:
        raise Refused(f"w_hh must have shape (gates * H, H), got {shape_of(&view)}")
    p.hidden_size = view.shape[1]
    rows = problem.cell.gates * p.hidden_size
    check(&view, "w_hh", problem.dtype, rows, p.hidden_size, -1)
    check_contiguous(&view, "w_hh")
    p.w_hh = view.data
    p.w_ih = read_weight(&problem.place, required(w_ih, "w_ih"), "w_ih", problem.dtype, rows, p.input_size)
    p.b_ih = read_weight(&problem.place, b_ih, "b_ih", problem.dtype, rows, -1)
    p.b_hh = read_weight(&problem.place, b_hh, "b_hh", problem.dtype, rows, -1)
    if (p.b_ih == NULL) != (p.b_hh == NULL):
        raise Refused("b_ih and b_hh must both be given or both be None")
    return 0


# Needs the batch and the weights. Also refuses what no kernel could index.
cdef int read_states(Problem* problem, h_0, c_0, bint float_state) except -1:
    cdef RecurrentParams* p = &problem.params
    cdef double elements = <double>p.steps * p.batch * (p.input_size + 8.0 * p.hidden_size)
    if elements > 2.0**59:
        raise Refused(f"{p.steps} steps of {p.batch} rows are too many for one call")
    if float_state and problem.dtype != kBFloat16:
        raise Refused(f"float_state is for bfloat16, got {DTYPES[problem.dtype]}")
    p.float_state = float_state
    problem.state_dtype = kFloat32 if float_state else problem.dtype
    read_state(&p.h_0, h_0, "h_0", problem)
    if c_0 is not None and not problem.cell.states:
        raise Refused(f"c_0 is for cells with a state beside h, got one for {problem.cell.name.decode()}")
    return read_state(&p.c_0, c_0, "c_0", problem)


cdef int use_panels(Problem* problem, Panels panels) except -1:
    cdef RecurrentParams* p = &problem.params
    if panels is None:
        return 0
    if panels.table != active:
        raise Refused(f"panels are packed for {panels.isa}, the active instruction set is {active_isa()}")
    if (
        panels.cell != problem.cell
        or panels.dtype != problem.dtype
        or panels.input_size != p.input_size
        or panels.hidden_size != p.hidden_size
    ):
        raise Refused("panels are packed from weights of another cell, dtype or shape")
    p.panels = panels.memory
    return 0
