# Layer normalization: tensors in, one kernel call, tensors out.

# A call: the params, and what its tensors are checked against beside them.
cdef struct LayerNormProblem:
    LayerNormParams params
    int dtype
    int compute_dtype
    int dims  # of the rows, the last of them the features


def layer_norm_forward(x, residual, weight, bias, double eps, bint return_sum, bint save, int threads):
    """(y, z, mean, rstd); z is None without a residual or `return_sum`, mean and rstd without `save`."""
    cdef LayerNormProblem problem
    cdef LayerNormParams* p = &problem.params
    cdef Status status
    z = mean = rstd = None
    start_layer_norm(&problem, x, "x", &p.x, weight, threads)
    p.bias = read_weight(&CPU, bias, "bias", problem.dtype, p.features, -1)
    p.eps = eps
    y = empty_rows(&p.y, &problem)
    if residual is not None:
        read_rows_of(&p.residual, residual, "residual", &problem)
        if return_sum:
            z = empty_rows(&p.z, &problem)
    if save:
        mean = empty(&p.mean, problem.compute_dtype, (p.steps, p.batch))
        rstd = empty(&p.rstd, problem.compute_dtype, (p.steps, p.batch))
    with nogil:
        status = active.layer_norm[problem.dtype].forward(p[0])
    check_status(status)
    return y, z, mean, rstd


def layer_norm_backward(dy, dz, z, weight, mean, rstd, needs, int threads):
    """(dx, dweight, dbias), None where `needs` says so."""
    cdef LayerNormProblem problem
    cdef LayerNormParams* p = &problem.params
    cdef Status status
    dx = dweight = dbias = None
    needs_x, needs_weight, needs_bias = needs
    start_layer_norm(&problem, z, "z", &p.z, weight, threads)
    read_rows_of(&p.dy, required(dy, "dy"), "dy", &problem)
    read_rows_of(&p.dz, dz, "dz", &problem)
    p.mean = <void*>read_moments(required(mean, "mean"), "mean", &problem)
    p.rstd = <void*>read_moments(required(rstd, "rstd"), "rstd", &problem)
    if needs_x:
        dx = empty_rows(&p.dx, &problem)
    if needs_weight:
        dweight = empty(&p.dweight, problem.dtype, (p.features,))
    if needs_bias:
        dbias = empty(&p.dbias, problem.dtype, (p.features,))
    with nogil:
        status = active.layer_norm[problem.dtype].backward(p[0])
    check_status(status)
    return dx, dweight, dbias


# The tensor that says the sizes, and the weight.
cdef int start_layer_norm(
    LayerNormProblem* problem, rows, str name, Sequence* out, weight, int threads
) except -1:
    cdef LayerNormParams* p = &problem.params
    cdef View view
    memset(problem, 0, sizeof(LayerNormProblem))
    read(rows, name, &view)
    if view.dims < 1 or view.dims > 3:
        raise Refused(f"{name} must have 1 to 3 dimensions, got {view.dims}")
    check_float(&view, name, view.dims)
    problem.dtype, problem.dims = view.dtype, view.dims
    problem.compute_dtype = kFloat64 if view.dtype == kFloat64 else kFloat32
    p.steps = view.shape[0] if view.dims == 3 else 1
    p.batch = view.shape[view.dims - 2] if view.dims > 1 else 1
    p.features = view.shape[view.dims - 1]
    # Expanded axes have no memory of their own: the results must still be something that can be indexed.
    if <double>p.steps * p.batch * p.features > 2.0**55:
        raise Refused(f"{name} is too large for one call, got shape {shape_of(&view)}")
    set_rows(out, &view, name)
    p.weight = read_weight(&CPU, weight, "weight", problem.dtype, p.features, -1)
    p.threads = threads if threads > 1 else 1
    return 0


cdef tuple shape_of_rows(const LayerNormProblem* problem):
    cdef const LayerNormParams* p = &problem.params
    return (p.steps, p.batch, p.features)[3 - problem.dims:]


cdef int set_rows(Sequence* out, const View* view, str name) except -1:
    check_unit_stride(view, name)
    out.data = view.data
    out.step_stride = view.stride[0] if view.dims == 3 else 0
    out.row_stride = view.stride[view.dims - 2] if view.dims > 1 else 0
    return 0


cdef int read_rows_of(Sequence* out, tensor, str name, const LayerNormProblem* problem) except -1:
    cdef View view
    if tensor is None:
        return 0
    read(tensor, name, &view)
    if view.dtype != problem.dtype:
        raise Refused(f"{name} must have dtype {DTYPES[problem.dtype]}, got {dtype_name(&view)}")
    if shape_of(&view) != shape_of_rows(problem):
        raise Refused(f"{name} must have shape {shape_of_rows(problem)}, got {shape_of(&view)}")
    return set_rows(out, &view, name)


cdef object empty_rows(Sequence* out, const LayerNormProblem* problem):
    cdef const LayerNormParams* p = &problem.params
    out.step_stride, out.row_stride = p.batch * p.features, p.features
    return empty(&out.data, problem.dtype, shape_of_rows(problem))


cdef const void* read_moments(tensor, str name, const LayerNormProblem* problem) except NULL:
    cdef View view
    read(tensor, name, &view)
    check(&view, name, problem.compute_dtype, problem.params.steps, problem.params.batch, -1)
    check_contiguous(&view, name)
    return view.data
