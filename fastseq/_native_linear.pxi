# Linear layers: tensors in, one kernel call, tensors out.

cdef class LinearPanels:
    """The weight and bias of a linear layer, packed for one instruction set."""

    cdef void* memory
    cdef const Kernels* table
    cdef int dtype
    cdef int64_t inputs, outputs
    cdef readonly int64_t nbytes

    def __dealloc__(self):
        release(self.memory)

    @property
    def isa(self):
        """The instruction set they were packed for; the only one that can read them."""
        return self.table.isa.decode()


def pack_linear(weight, bias, int threads):
    """weight (N, K) and bias (N,) or None, packed for the active instruction set."""
    cdef LinearParams p
    cdef const LinearKernels* kernels
    cdef View view
    cdef LinearPanels panels = LinearPanels.__new__(LinearPanels)
    memset(&p, 0, sizeof(p))
    read(weight, "weight", &view)
    check_float(&view, "weight", 2)
    check_contiguous(&view, "weight")
    p.outputs, p.inputs, p.weight = view.shape[0], view.shape[1], view.data
    p.bias = read_weight(&CPU, bias, "bias", view.dtype, p.outputs, -1)
    p.threads = threads if threads > 1 else 1
    kernels = active.linear + view.dtype
    panels.table, panels.dtype, panels.inputs, panels.outputs = active, view.dtype, p.inputs, p.outputs
    panels.nbytes = kernels.panels_bytes(p)
    panels.memory = allocate(panels.nbytes)
    if panels.memory == NULL:
        raise MemoryError(f"no memory for {panels.nbytes} bytes of packed weights")
    with nogil:
        kernels.pack(p, panels.memory)
    return panels


def linear_forward(x, LinearPanels panels not None, int threads):
    """x W^T + bias, with what `pack_linear` packed with the active instruction set."""
    cdef LinearParams p
    cdef View view
    cdef Status status
    cdef tuple shape
    if panels.table != active:
        raise Refused(f"panels were packed for {panels.isa}, the active instruction set is {active_isa()}")
    memset(&p, 0, sizeof(p))
    read(x, "x", &view)
    if view.dims < 1 or view.dims > 3:
        raise Refused(f"x must have 1 to 3 dimensions, got {view.dims}")
    check_float(&view, "x", view.dims)
    if view.dtype != panels.dtype:
        raise Refused(f"x must have dtype {DTYPES[panels.dtype]}, got {dtype_name(&view)}")
    p.inputs, p.outputs = panels.inputs, panels.outputs
    if view.shape[view.dims - 1] != p.inputs:
        raise Refused(f"x must have {p.inputs} features, got shape {shape_of(&view)}")
    p.steps = view.shape[0] if view.dims == 3 else 1
    p.batch = view.shape[view.dims - 2] if view.dims > 1 else 1
    # Expanded axes have no memory of their own: the result must still be something that can be indexed.
    if <double>p.steps * p.batch * (p.inputs + p.outputs) > 2.0**55:
        raise Refused(f"x is too large for one call, got shape {shape_of(&view)}")
    set_rows(&p.x, &view, "x")
    shape = (p.steps, p.batch, p.outputs)
    y = empty(&p.y, view.dtype, shape[3 - view.dims:])
    p.panels = panels.memory
    p.threads = threads if threads > 1 else 1
    with nogil:
        status = active.linear[view.dtype].forward(p)
    check_status(status)
    return y
