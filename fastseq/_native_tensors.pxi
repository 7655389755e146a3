# Reading tensors and allocating them: the part of _native.pyx that knows what a tensor is.

# The dtypes of kernels.h, and three more that arguments may have.
cdef enum:
    INT64 = 4
    BOOL = 5
    UINT8 = 6

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "bool", "uint8")
cdef int64_t[7] ITEM_SIZE = [4, 8, 2, 2, 8, 1, 1]

# Where the memory of a tensor is, in DLPack's terms.
cdef struct Place:
    int type
    int index

cdef Place CPU
CPU.type, CPU.index = kDLCPU, 0

cdef struct View:
    char* data
    Place place
    int dtype  # -1: none of the above
    int dims
    int64_t[4] shape
    int64_t[4] stride  # in elements

# A call: the params, and what its tensors are checked against beside them.
cdef struct Problem:
    RecurrentParams params
    Place place
    int dtypes  # how many of the table there are kernels for
    const CellKernels* cell
    int dtype
    int state_dtype
    bint leading  # states have an axis of one before the others
    int64_t rows  # of a packed sequence

cdef DLPackExchangeAPI* exchange = NULL
cdef object Refused = None
cdef object attention_type = None
cdef object tensor_type = None
cdef object parameter_type = None
cdef object is_negated = None
cdef object count_threads = None
cdef dict new_tensor = None


def attach(refused, attention, tensor, parameter, is_neg, get_num_threads, dict empty, capsule):
    """Hands over the exception of arguments that are not served, the type of attention's options, and torch: its two
    types, Tensor.is_neg, get_num_threads, by the name of a dtype what makes a tensor of a shape, and the capsule
    Tensor.__dlpack_c_exchange_api__.

    Without the last, or where its version is not ours, tensors are read through their Python attributes.
    Returns whether it is used.
    """
    global Refused, attention_type, tensor_type, parameter_type, is_negated, count_threads, new_tensor, exchange
    cdef DLPackExchangeAPI* table = NULL
    if attention._fields != ATTENTION_FIELDS:
        raise ImportError(f"the options of attention must be {', '.join(ATTENTION_FIELDS)}, got {attention._fields}")
    if capsule is not None:
        table = <DLPackExchangeAPI*>PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
        if table.header.version.major != <uint32_t>DLPACK_MAJOR_VERSION or table.dltensor_from_py_object_no_sync == NULL:
            table = NULL
    tensor_type, parameter_type, is_negated, new_tensor, exchange = tensor, parameter, is_neg, empty, table
    count_threads, Refused, attention_type = get_num_threads, refused, attention
    return table != NULL


cdef int read(tensor, str name, View* view) except -1:
    return read_at(&CPU, tensor, name, view)


cdef int read_at(const Place* place, tensor, str name, View* view) except -1:
    read_anywhere(tensor, name, view)
    if view.place.type != place.type:
        raise Refused(f"{name} must be on {'the CPU' if place.type == kDLCPU else 'a GPU'}, got {tensor.device}")
    if view.place.index != place.index:
        raise Refused(f"{name} must be on the GPU of index {place.index}, got {tensor.device}")
    return 0


cdef int read_anywhere(tensor, str name, View* view) except -1:
    cdef DLTensor source
    cdef int axis
    if type(tensor) is not tensor_type and type(tensor) is not parameter_type:
        raise Refused(f"{name} must be a torch.Tensor or a torch.nn.Parameter, got {type(tensor).__name__}")
    # A view that torch negates lazily: its bytes are not its values.
    if is_negated(tensor):
        raise Refused(f"{name} must not have its negative bit set")
    if exchange == NULL:
        read_attributes(tensor, name, view)
    else:
        if exchange.dltensor_from_py_object_no_sync(<void*>tensor, &source):
            refuse_unreadable(name)
        if source.ndim > 4:
            raise Refused(f"{name} must have at most 4 dimensions, got {source.ndim}")
        view.data = <char*>source.data + source.byte_offset
        view.place.type, view.place.index = source.device.device_type, source.device.device_id
        view.dtype = dtype_of(source.dtype)
        view.dims = source.ndim
        for axis in range(source.ndim):
            view.shape[axis] = source.shape[axis]
            view.stride[axis] = source.strides[axis]
    if view.data == NULL:
        check_no_elements(tensor, view, name)
    return 0


# torch cannot describe the tensor: it is sparse, quantized, nested or within a transform. Its exception is set.
cdef int refuse_unreadable(str name) except -1:
    try:
        reraise()
    except RuntimeError as error:
        raise Refused(f"{name} has no plain memory: {str(error).splitlines()[0]}") from None
    return 0


cdef int reraise() except -1:
    return -1


# A tensor whose storage was freed, as by resizing it to zero, still tells its shape.
cdef int check_no_elements(tensor, const View* view, str name) except -1:
    cdef int axis
    for axis in range(view.dims):
        if view.shape[axis] == 0:
            return 0
    if tensor._is_zerotensor():
        raise Refused(f"{name} has no memory: it stands for zeros")
    # Not for torch to say: on a layer whose weights were freed its kernels were seen to hang.
    raise RuntimeError(f"{name} has no memory behind it: its storage was freed")


cdef int dtype_of(DLDataType dtype) noexcept:
    if dtype.lanes != 1:
        return -1
    if dtype.code == kDLFloat:
        return kFloat32 if dtype.bits == 32 else kFloat64 if dtype.bits == 64 else kFloat16 if dtype.bits == 16 else -1
    if dtype.code == kDLBfloat:
        return kBFloat16 if dtype.bits == 16 else -1
    if dtype.code == kDLInt:
        return INT64 if dtype.bits == 64 else -1
    if dtype.code == kDLUInt:
        return UINT8 if dtype.bits == 8 else -1
    return BOOL if dtype.code == kDLBool else -1


cdef int read_attributes(tensor, str name, View* view) except -1:
    cdef int axis
    view.place.type = {"cpu": kDLCPU, "cuda": kDLCUDA}.get(tensor.device.type, -1)
    view.place.index = tensor.device.index or 0
    if view.place.type < 0:
        raise Refused(f"{name} must be on the CPU or a GPU, got {tensor.device}")
    try:
        shape, stride, memory = tensor.shape, tensor.stride(), tensor.data_ptr()
    except RuntimeError as error:
        raise Refused(f"{name} has no plain memory: {str(error).splitlines()[0]}") from None
    dtype = str(tensor.dtype)[len("torch."):]
    if len(shape) > 4:
        raise Refused(f"{name} must have at most 4 dimensions, got {len(shape)}")
    view.data = <char*><uintptr_t>memory
    view.dtype = DTYPES.index(dtype) if dtype in DTYPES else -1
    view.dims = len(shape)
    for axis in range(view.dims):
        view.shape[axis] = shape[axis]
        view.stride[axis] = stride[axis]
    return 0


cdef str dtype_name(const View* view):
    return "another" if view.dtype < 0 else DTYPES[view.dtype]


cdef tuple shape_of(const View* view):
    return tuple([view.shape[axis] for axis in range(view.dims)])


# A size of -1 stands for a dimension that is not there.
cdef int check(const View* view, str name, int dtype, int64_t d0, int64_t d1, int64_t d2) except -1:
    cdef int dims = 1 if d1 < 0 else 2 if d2 < 0 else 3
    if view.dtype != dtype:
        raise Refused(f"{name} must have dtype {DTYPES[dtype]}, got {dtype_name(view)}")
    if (
        view.dims != dims
        or view.shape[0] != d0
        or (dims > 1 and view.shape[1] != d1)
        or (dims > 2 and view.shape[2] != d2)
    ):
        raise Refused(f"{name} must have shape {(d0, d1, d2)[:dims]}, got {shape_of(view)}")
    return 0


# A tensor that says itself which dtype and sizes the others must have.
cdef int check_float(const View* view, str name, int dims, int dtypes=kDtypes) except -1:
    cdef int axis
    if view.dtype < 0 or view.dtype >= dtypes:
        raise Refused(f"{name} must have dtype {', '.join(DTYPES[:dtypes])}")
    if view.dims != dims:
        raise Refused(f"{name} must have {dims} dimensions, got {view.dims}")
    for axis in range(dims):
        if view.shape[axis] < 1:
            raise Refused(f"{name} must not be empty, got shape {shape_of(view)}")
    return 0


cdef int check_unit_stride(const View* view, str name) except -1:
    if view.stride[view.dims - 1] != 1 and view.shape[view.dims - 1] != 1:
        raise Refused(f"{name} must be contiguous along its last dimension")
    return 0


# Returns the number of elements.
cdef int64_t check_contiguous(const View* view, str name) except -1:
    cdef int64_t count = 1
    cdef int axis
    for axis in range(view.dims - 1, -1, -1):
        if view.stride[axis] != count and view.shape[axis] > 1:
            raise Refused(f"{name} must be contiguous")
        count *= view.shape[axis]
    return count


# No element of an output may be reached twice, as in expanded tensors and overlapping windows.
cdef int check_distinct(const View* view, str name) except -1:
    cdef int64_t reach = 1
    cdef int[4] order  # the axes by growing stride
    cdef int axis, place
    for axis in range(view.dims):
        place = axis
        while place > 0 and view.stride[order[place - 1]] > view.stride[axis]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = axis
    for place in range(view.dims):
        axis = order[place]
        if view.shape[axis] > 1:
            if view.stride[axis] < reach:
                raise Refused(f"{name} must not overlap itself")
            reach += view.stride[axis] * (view.shape[axis] - 1)
    return 0


cdef const void* read_weight(
    const Place* place, tensor, str name, int dtype, int64_t d0, int64_t d1
) except? NULL:
    cdef View view
    if tensor is None:
        return NULL
    read_at(place, tensor, name, &view)
    check(&view, name, dtype, d0, d1, -1)
    check_contiguous(&view, name)
    return view.data


cdef int read_sequence(
    Sequence* out, tensor, str name, const Problem* problem, int64_t columns, bint written
) except -1:
    cdef View view
    if tensor is None:
        return 0
    read_at(&problem.place, tensor, name, &view)
    if problem.params.packed:
        check(&view, name, problem.dtype, problem.rows, columns, -1)
    else:
        check(&view, name, problem.dtype, problem.params.steps, problem.params.batch, columns)
    check_unit_stride(&view, name)
    if written:
        check_distinct(&view, name)
    out.data = view.data
    out.step_stride = 0 if problem.params.packed else view.stride[0]
    out.row_stride = view.stride[view.dims - 2]
    return 0


cdef int read_state(State* out, tensor, str name, const Problem* problem) except -1:
    cdef View view
    if tensor is None:
        return 0
    read_at(&problem.place, tensor, name, &view)
    if problem.leading:
        check(&view, name, problem.state_dtype, 1, problem.params.batch, problem.params.hidden_size)
    else:
        check(&view, name, problem.state_dtype, problem.params.batch, problem.params.hidden_size, -1)
    check_unit_stride(&view, name)
    out.data = view.data
    out.row_stride = view.stride[view.dims - 2]
    return 0


# An ordinary tensor.
cdef object empty(void** data, int dtype, tuple shape):
    cdef View view
    tensor = new_tensor[DTYPES[dtype]](*shape)  # a tuple takes half as long again
    read(tensor, "output", &view)
    data[0] = view.data
    return tensor


cdef object empty_sequence(Sequence* out, const Problem* problem, int64_t columns):
    cdef const RecurrentParams* p = &problem.params
    out.row_stride = columns
    if p.packed:
        return empty(&out.data, problem.dtype, (problem.rows, columns))
    out.step_stride = p.batch * columns
    tensor = empty(&out.data, problem.dtype, (p.steps, p.batch, columns))
    if p.batch_sizes != NULL:
        with nogil:
            memset(out.data, 0, p.steps * out.step_stride * ITEM_SIZE[problem.dtype])
    return tensor


cdef object empty_state(State* out, const Problem* problem):
    cdef int64_t batch = problem.params.batch, hidden_size = problem.params.hidden_size
    out.row_stride = hidden_size
    if problem.leading:
        return empty(&out.data, problem.state_dtype, (1, batch, hidden_size))
    return empty(&out.data, problem.state_dtype, (batch, hidden_size))


# A state for a single step. The exchange table allocates at half the cost of torch.empty, but the storage that it
# makes cannot be resized, which is why longer calls do without it.
cdef object empty_step(void** data, const Problem* problem, int dtype):
    cdef int64_t[2] shape
    cdef DLTensor prototype
    cdef DLManagedTensorVersioned* managed = NULL
    cdef void* made = NULL
    if exchange == NULL:
        return empty(data, dtype, (problem.params.batch, problem.params.hidden_size))
    shape[0] = problem.params.batch
    shape[1] = problem.params.hidden_size
    memset(&prototype, 0, sizeof(prototype))
    prototype.device.device_type = kDLCPU
    prototype.ndim = 2
    prototype.dtype.code = kDLBfloat if dtype == kBFloat16 else kDLFloat
    prototype.dtype.bits = 8 * ITEM_SIZE[dtype]
    prototype.dtype.lanes = 1
    prototype.shape = shape
    exchange.managed_tensor_allocator(&prototype, &managed, NULL, set_error)
    data[0] = managed.dl_tensor.data
    exchange.managed_tensor_to_py_object_no_sync(managed, &made)
    tensor = <object>made
    Py_DECREF(tensor)  # made came with a reference of its own
    return tensor


cdef void set_error(void* context, const char* kind, const char* message) noexcept with gil:
    PyErr_SetString(RuntimeError, message)
