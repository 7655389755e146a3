# Attention: tensors in, one kernel call, tensors out.

# A call: the params, and what its tensors are checked against beside them.
cdef struct AttentionProblem:
    AttentionParams params
    Place place
    int dtypes  # how many of the table there are kernels for
    int dtype
    int compute_dtype
    View q, k, v
    int64_t q_rows, k_rows  # of a head: L and S, or the total of a packed batch
    bint q_packed, k_packed
    bint q_gaps, k_gaps  # rows of a packed batch that belong to no sequence; zero in results


# The fields of `Attention` in backends/contract.py, in the order in which `read_attention` reads them.
cdef tuple ATTENTION_FIELDS = (
    "scale", "softcap", "left", "right", "lower_right", "dropout_p", "seed", "lengths_q", "lengths_k", "starts_q",
    "starts_k", "max_q", "max_k", "alibi_slopes",
)


def attention_forward(call, q, k, v, bias=None, allowed=None, *, bint return_lse=False, out=None):
    """Scaled-dot-product attention: (out, lse).

    B batch, N query heads, Nk heads of keys and values (N a multiple of Nk), L queries, S keys, D and E their widths,
    all at least 1. Strides are any, but 1 along the last axis. The score of query i and key j is

        s = scale * <q_i, k_j>, then softcap * tanh(s / softcap), + bias, - slope * |i + shift - j|, in this order

    and out_i the sum of v_j weighted by the softmax over the keys that the query may see; 0 where it may see none.

    Args:
        call: an `Attention`, which says what its options mean. Its lengths and starts are on the CPU.
        q: (B, N, L, D), or (1, N, total, D) of a packed batch.
        k, v: (B, Nk, S, D) and (B, Nk, S, E), or packed in the same way.
        bias, allowed: what broadcasts to (B, N, L, S); the former of q's dtype, the latter bool, True where the query
            may see the key. L and S are max_q and max_k in a packed batch.
        return_lse: also the log of the sum of exp(s), which `attention_backward` needs: (B, N, L), packed
            (1, N, total), float64. None otherwise.
        out: to write into. None: a new tensor whose axes have the order of q's in memory.

    Rows beyond a length, or packed ones of no sequence, are 0 in the results, those of the lse -inf in the former case.
    """
    cdef AttentionProblem problem
    cdef AttentionParams* p = &problem.params
    cdef Status status
    lse = None
    start_attention(&problem, &CPU, kDtypes)
    read_attention(&problem, call, q, k, v, bias, allowed)
    if out is None:
        out = empty_heads(&p.out, &problem, problem.q, p.value_dim, problem.q_packed, problem.q_gaps)
    else:
        read_heads(&p.out, out, "out", &problem, p.heads, problem.q_rows, p.value_dim, problem.q_packed, True)
    if return_lse:
        lse = empty(<void**>&p.lse, kFloat64, rows_shape(&problem))
        set_row_strides(p.lse_strides, &problem)
        if problem.q_gaps:
            with nogil:
                memset(p.lse, 0, p.heads * problem.q_rows * ITEM_SIZE[kFloat64])
    with nogil:
        status = active.attention[problem.dtype].forward(p[0])
    check_status(status)
    return out, lse


def attention_backward(call, q, k, v, bias, allowed, out, lse, dout, dlse, needs, *, dq=None, dk=None, dv=None):
    """The gradients (dq, dk, dv, dbias), None where `needs` says so.

    Args:
        out, lse: what `attention_forward(return_lse=True)` returned for the same arguments.
        dout, dlse: their gradients; None for zero.
        needs: four bools, in the order of the result.
        dq, dk, dv: to write into, with rows of a packed batch that are in no sequence left as they are. None: new
            tensors, laid out like q, k and v.
    """
    cdef AttentionProblem problem
    cdef AttentionParams* p = &problem.params
    cdef Status status
    dbias = None
    needs_q, needs_k, needs_v, needs_bias = needs
    start_attention(&problem, &CPU, kDtypes)
    read_attention(&problem, call, q, k, v, bias, allowed)
    read_heads(&p.out, out, "out", &problem, p.heads, problem.q_rows, p.value_dim, problem.q_packed, False)
    read_heads(&p.dout, dout, "dout", &problem, p.heads, problem.q_rows, p.value_dim, problem.q_packed, False)
    p.lse = <double*>read_rows(p.lse_strides, required(lse, "lse"), "lse", &problem)
    p.dlse = <const double*>read_rows(p.dlse_strides, dlse, "dlse", &problem)
    if dq is not None:
        read_heads(&p.dq, dq, "dq", &problem, p.heads, problem.q_rows, p.head_dim, problem.q_packed, True)
    elif needs_q:
        dq = empty_heads(&p.dq, &problem, problem.q, p.head_dim, problem.q_packed, problem.q_gaps)
    if dk is not None:
        read_heads(&p.dk, dk, "dk", &problem, p.kv_heads, problem.k_rows, p.head_dim, problem.k_packed, True)
    elif needs_k:
        dk = empty_heads(&p.dk, &problem, problem.k, p.head_dim, problem.k_packed, problem.k_gaps)
    if dv is not None:
        read_heads(&p.dv, dv, "dv", &problem, p.kv_heads, problem.k_rows, p.value_dim, problem.k_packed, True)
    elif needs_v:
        dv = empty_heads(&p.dv, &problem, problem.v, p.value_dim, problem.k_packed, problem.k_gaps)
    if needs_bias and bias is not None:
        dbias = empty_bias(&problem, bias.shape)
    with nogil:
        status = active.attention[problem.dtype].backward(p[0])
    check_status(status)
    return dq, dk, dv, dbias if dbias is None else dbias.to(q.dtype)


cdef void start_attention(AttentionProblem* problem, const Place* place, int dtypes) noexcept:
    memset(problem, 0, sizeof(AttentionProblem))
    problem.place, problem.dtypes = place[0], dtypes


# What forward and backward share, on the CPU and on a GPU. Lengths and starts are read on the CPU.
cdef int read_attention(AttentionProblem* problem, call, q, k, v, bias, allowed) except -1:
    cdef AttentionParams* p = &problem.params
    cdef View* query = &problem.q
    cdef View* key = &problem.k
    cdef View* value = &problem.v
    if type(call) is not attention_type:
        raise TypeError(f"the options must be an Attention, got {type(call).__name__}")
    (
        scale, softcap, left, right, lower_right, dropout_p, seed, lengths_q, lengths_k, starts_q, starts_k, max_q,
        max_k, alibi_slopes,
    ) = PyTuple_GetSlice(call, 0, len(ATTENTION_FIELDS))  # a tuple by type: the items of one by name take 50 ns each
    read_at(&problem.place, q, "q", query)
    check_float(query, "q", 4, problem.dtypes)
    read_at(&problem.place, k, "k", key)
    check_float(key, "k", 4, problem.dtypes)
    read_at(&problem.place, v, "v", value)
    check_float(value, "v", 4, problem.dtypes)
    problem.dtype = query.dtype
    problem.compute_dtype = kFloat64 if query.dtype == kFloat64 else kFloat32
    problem.q_packed, problem.k_packed = starts_q is not None, starts_k is not None
    problem.q_rows, problem.k_rows = query.shape[2], key.shape[2]
    p.heads, p.kv_heads, p.head_dim, p.value_dim = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    if p.heads % p.kv_heads:
        raise Refused(f"q must have a multiple of the {p.kv_heads} heads of k, got {p.heads}")
    p.batch = batch_of(query, "q", lengths_q, problem.q_packed)
    if batch_of(key, "k", lengths_k, problem.k_packed) != p.batch:
        raise Refused(f"q and k must have the same batch size, got shapes {shape_of(query)} and {shape_of(key)}")
    p.queries = longest(max_q, "max_q", problem.q_rows, problem.q_packed)
    p.keys = longest(max_k, "max_k", problem.k_rows, problem.k_packed)
    # Also refuses what no kernel could index.
    if <double>p.batch * (p.heads + p.kv_heads) * (<double>p.queries + p.keys) * (
        p.head_dim + p.value_dim + 1024.0
    ) > 2.0**55:
        raise Refused(f"{p.batch} rows of {p.heads} heads are too many for one call")
    set_heads(&p.q, query, "q", problem, p.heads, problem.q_rows, p.head_dim, problem.q_packed)
    set_heads(&p.k, key, "k", problem, p.kv_heads, problem.k_rows, p.head_dim, problem.k_packed)
    set_heads(&p.v, value, "v", problem, p.kv_heads, problem.k_rows, p.value_dim, problem.k_packed)
    p.q_lengths = read_lengths(lengths_q, "lengths_q", p.batch, p.queries)
    p.k_lengths = read_lengths(lengths_k, "lengths_k", p.batch, p.keys)
    p.q_starts = read_starts(starts_q, "starts_q", p.q_lengths, p.batch, problem.q_rows, &problem.q_gaps)
    p.k_starts = read_starts(starts_k, "starts_k", p.k_lengths, p.batch, problem.k_rows, &problem.k_gaps)
    p.bias = read_mask(p.bias_strides, bias, "bias", problem, problem.dtype)
    p.allowed = <const uint8_t*>read_mask(p.allowed_strides, allowed, "allowed", problem, BOOL)
    read_slopes(problem, alibi_slopes)
    p.left = side(left, "left")
    p.right = side(right, "right")
    p.lower_right = lower_right
    p.scale, p.softcap, p.dropout_p, p.seed = scale, softcap, dropout_p, seed
    if not 0 <= p.softcap < INFINITY:
        raise Refused(f"softcap must be 0, for none, or positive, got {softcap}")
    if not 0 <= p.dropout_p < 1:
        raise Refused(f"dropout_p must be in [0, 1), got {dropout_p}")
    p.threads = max(1, <int>count_threads())
    return 0


cdef int64_t batch_of(const View* view, str name, lengths, bint packed) except -1:
    cdef View sizes
    if not packed:
        return view.shape[0]
    if view.shape[0] != 1:
        raise Refused(f"{name} must have shape (1, heads, total, dim) in a packed batch, got {shape_of(view)}")
    if lengths is None:
        raise Refused(f"starts_{name} needs lengths_{name}")
    read(lengths, f"lengths_{name}", &sizes)
    if sizes.dims != 1 or sizes.shape[0] < 1:
        raise Refused(f"lengths_{name} must have shape (B,), got {shape_of(&sizes)}")
    return sizes.shape[0]


# The largest number of rows that a sequence may have.
cdef int64_t longest(given, str name, int64_t rows, bint packed) except -1:
    cdef int64_t most
    if not packed:
        if given is not None and given != rows:
            raise Refused(f"{name} must be {rows}, got {given}")
        return rows
    if given is None:
        raise Refused(f"a packed batch needs {name}")
    most = given
    if most < 0 or most > rows:
        raise Refused(f"{name} must be in [0, {rows}], got {most}")
    return most


cdef int64_t side(given, str name) except? -1:
    return INT64_MAX if given is None else given


cdef const int64_t* read_lengths(lengths, str name, int64_t batch, int64_t most) except? NULL:
    cdef View view
    cdef const int64_t* data
    cdef int64_t b
    if lengths is None:
        return NULL
    read(lengths, name, &view)
    check(&view, name, INT64, batch, -1, -1)
    check_contiguous(&view, name)
    data = <const int64_t*>view.data
    for b in range(batch):
        if data[b] < 0 or data[b] > most:
            raise Refused(f"{name} must be in [0, {most}], got {data[b]} at {b}")
    return data


# Sequences follow each other: no row belongs to two of them.
cdef const int64_t* read_starts(
    starts, str name, const int64_t* lengths, int64_t batch, int64_t rows, bint* gaps
) except? NULL:
    cdef View view
    cdef const int64_t* data
    cdef int64_t b
    cdef int64_t end = 0
    cdef int64_t covered = 0
    if starts is None:
        return NULL
    read(starts, name, &view)
    check(&view, name, INT64, batch, -1, -1)
    check_contiguous(&view, name)
    data = <const int64_t*>view.data
    for b in range(batch):
        if data[b] < end or data[b] > rows - lengths[b]:
            raise Refused(
                f"{name} must name rows after each other within {rows}, got {data[b]} with length {lengths[b]} at {b}"
            )
        end = data[b] + lengths[b]
        covered += lengths[b]
    gaps[0] = covered < rows
    return data


cdef int set_heads(
    Heads* out, const View* view, str name, const AttentionProblem* problem, int64_t heads, int64_t rows,
    int64_t columns, bint packed
) except -1:
    cdef int64_t batch = 1 if packed else problem.params.batch
    if view.dtype != problem.dtype:
        raise Refused(f"{name} must have dtype {DTYPES[problem.dtype]}, got {dtype_name(view)}")
    if (
        view.dims != 4
        or view.shape[0] != batch
        or view.shape[1] != heads
        or view.shape[2] != rows
        or view.shape[3] != columns
    ):
        raise Refused(f"{name} must have shape {(batch, heads, rows, columns)}, got {shape_of(view)}")
    check_unit_stride(view, name)
    store_heads(out, view, packed)
    return 0


cdef void store_heads(Heads* out, const View* view, bint packed) noexcept:
    out.data = view.data
    out.batch_stride = 0 if packed else view.stride[0]
    out.head_stride = view.stride[1]
    out.row_stride = view.stride[2]


cdef int read_heads(
    Heads* out, tensor, str name, const AttentionProblem* problem, int64_t heads, int64_t rows, int64_t columns,
    bint packed, bint written
) except -1:
    cdef View view
    read_at(&problem.place, required(tensor, name), name, &view)
    set_heads(out, &view, name, problem, heads, rows, columns, packed)
    if written:
        check_distinct(&view, name)
    return 0


# A tensor like that of `view` but for its last dimension, its axes in the same order of strides; a stride of 0, of an
# expanded axis, says nothing.
cdef object empty_heads(
    Heads* out, const AttentionProblem* problem, View view, int64_t columns, bint packed, bint zeros
):
    cdef int[3] axes = [0, 1, 2]
    cdef int[3] places
    cdef int64_t elements = columns
    cdef int place
    for place in (1, 2, 1):  # sorts them; equal strides stay in order
        if 0 < view.stride[axes[place - 1]] < view.stride[axes[place]]:
            axes[place - 1], axes[place] = axes[place], axes[place - 1]
    tensor = empty(
        &out.data, problem.dtype, (view.shape[axes[0]], view.shape[axes[1]], view.shape[axes[2]], columns)
    )
    for place in (2, 1, 0):
        places[axes[place]] = place
        view.stride[axes[place]] = elements
        elements *= view.shape[axes[place]]
    if zeros:
        memset(out.data, 0, elements * ITEM_SIZE[problem.dtype])
    if places[0] != 0 or places[1] != 1:
        tensor = tensor.permute(places[0], places[1], places[2], 3)
    view.data = <char*>out.data
    store_heads(out, &view, packed)
    return tensor


cdef tuple rows_shape(const AttentionProblem* problem):
    return (1 if problem.q_packed else problem.params.batch, problem.params.heads, problem.q_rows)


cdef void set_row_strides(int64_t* strides, const AttentionProblem* problem) noexcept:
    strides[0] = 0 if problem.q_packed else problem.params.heads * problem.q_rows
    strides[1] = problem.q_rows
    strides[2] = 1


cdef void* read_rows(int64_t* strides, tensor, str name, const AttentionProblem* problem) except? NULL:
    cdef View view
    if tensor is None:
        return NULL
    read_at(&problem.place, tensor, name, &view)
    shape = rows_shape(problem)
    check(&view, name, kFloat64, shape[0], shape[1], shape[2])
    strides[0] = 0 if problem.q_packed else view.stride[0]
    strides[1], strides[2] = view.stride[1], view.stride[2]
    return view.data


cdef const void* read_mask(
    int64_t* strides, tensor, str name, const AttentionProblem* problem, int dtype
) except? NULL:
    cdef const AttentionParams* p = &problem.params
    cdef View view
    cdef int axis, own
    cdef int64_t[4] full = [p.batch, p.heads, p.queries, p.keys]
    if tensor is None:
        return NULL
    read_at(&problem.place, tensor, name, &view)
    if view.dtype != dtype:
        raise Refused(f"{name} must have dtype {DTYPES[dtype]}, got {dtype_name(&view)}")
    for axis in range(4):
        own = axis - 4 + view.dims
        if own < 0 or view.shape[own] == 1:
            strides[axis] = 0
        elif view.shape[own] == full[axis]:
            strides[axis] = view.stride[own]
        else:
            raise Refused(f"{name} must broadcast to shape {tuple(full)}, got {shape_of(&view)}")
    return view.data


cdef int read_slopes(AttentionProblem* problem, tensor) except -1:
    cdef AttentionParams* p = &problem.params
    cdef View view
    if tensor is None:
        return 0
    read_at(&problem.place, tensor, "alibi_slopes", &view)
    check(&view, "alibi_slopes", kFloat32, p.batch, p.heads, -1)
    p.alibi_slopes = <const float*>view.data
    p.alibi_batch_stride, p.alibi_head_stride = view.stride[0], view.stride[1]
    return 0


# The gradient of the bias, in its shape.
cdef object empty_bias(AttentionProblem* problem, shape):
    set_bias_strides(problem, shape)
    return empty(&problem.params.dbias, problem.compute_dtype, tuple(shape))


cdef int set_bias_strides(AttentionProblem* problem, shape) except -1:
    cdef AttentionParams* p = &problem.params
    cdef int64_t count = 1
    cdef int64_t size
    cdef int axis
    cdef int64_t[4] full = [p.batch, p.heads, p.queries, p.keys]
    shape = (1,) * (4 - len(shape)) + tuple(shape)
    for axis in range(3, -1, -1):
        size = shape[axis]
        if size != 1 and size != full[axis]:
            raise Refused(f"the gradient of the bias must broadcast to shape {tuple(full)}, got {shape}")
        p.dbias_strides[axis] = 0 if size != full[axis] else count
        count *= size
    return 0
