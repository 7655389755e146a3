# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, binding=False
"""Tensors in, one kernel call, tensors out.

Knows of torch what `attach` is given, and checks what could corrupt memory: exact type, device, dtype, shape and strides
of every tensor. What the arguments mean is written in backends/native.py, which is the only caller, or where that does
not wrap a function, beside the function.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF
from cpython.tuple cimport PyTuple_GetSlice
from libc.math cimport INFINITY
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

cdef const Kernels* active = default_kernels()

include "_native_tensors.pxi"
include "_native_recurrent.pxi"
include "_native_attention.pxi"
include "_native_layer_norm.pxi"
include "_native_linear.pxi"
include "_native_cuda.pxi"


def isas():
    """The names of the instruction sets that run on this machine, worst first."""
    cdef const Kernels* const* table = available_kernels()
    names = []
    while table[0] != NULL:
        names.append(table[0].isa.decode())
        table += 1
    return tuple(names)


def active_isa():
    """The instruction set in use, as its own table names it; None if FASTSEQ_ISA names none of `isas()`."""
    return None if active == NULL else active.isa.decode()


def activate(name):
    """Uses the instruction set of this name from now on."""
    global active
    active = table_of(name)


def vector_bytes():
    """Bytes of a vector register of the active instruction set."""
    return active.vector_bytes


def fma_peak(dtype, double seconds):
    """Measured peak of one core with the active instruction set, in flops per second."""
    cdef int index = DTYPES.index(dtype)
    cdef double flops
    if index >= kDtypes:
        raise ValueError(f"there are no kernels for {dtype}")
    with nogil:
        flops = active.fma_peak(index, seconds)
    return flops


def read_rate(tensor, double seconds, int threads):
    """Measured rate at which a team reads a contiguous tensor, in bytes per second."""
    cdef View view
    cdef int64_t bytes = read_bytes(tensor, &view)
    cdef double rate
    with nogil:
        rate = active.read_rate(view.data, bytes, threads, seconds)
    return rate


def checksum(*tensors):
    """Two integers for each tensor, that depend on every byte of it and on its place; tensors must be contiguous. One
    that is None has none."""
    cdef View view
    cdef Checksum result
    cdef int64_t bytes
    cdef int threads = count_threads()
    sums = []
    for tensor in tensors:
        if tensor is not None:
            bytes = read_bytes(tensor, &view)
            with nogil:
                result = kernels_checksum(view.data, bytes, threads)
            sums.append(result.sum)
            sums.append(result.weighted)
    return tuple(sums)


# The size of a contiguous tensor.
cdef int64_t read_bytes(tensor, View* view) except -1:
    read(tensor, "tensor", view)
    if view.dtype < 0:
        raise Refused(f"tensor must have one of the dtypes {', '.join(DTYPES)}, got {tensor.dtype}")
    return check_contiguous(view, "tensor") * ITEM_SIZE[view.dtype]


cdef const Kernels* table_of(name) except NULL:
    cdef const Kernels* const* table = available_kernels()
    while table[0] != NULL:
        if table[0].isa == <bytes>name.encode():
            return table[0]
        table += 1
    raise ValueError(f"instruction set {name!r} is none of those of this machine: {', '.join(isas())}")


def cells():
    """The facts of each cell, in the order of the tables: name, gates, states, slots, input_slot, recurrent_slot,
    first_gate, carry. CellKernels in csrc/kernels.h says what they mean; they are the same in all tables."""
    cdef const CellKernels* const* cell = available_kernels()[0].cells
    facts = []
    while cell[0] != NULL:
        facts.append((
            cell[0].name.decode(), cell[0].gates, cell[0].states, cell[0].slots, cell[0].input_slot,
            cell[0].recurrent_slot, cell[0].first_gate, bool(cell[0].carry),
        ))
        cell += 1
    return facts


# The place of each cell in the tables.
cdef dict cell_places = {facts[0]: place for place, facts in enumerate(cells())}


cdef int place_of(cell) except -1:
    place = cell_places.get(cell)
    if place is None:
        raise Refused(f"cell must be one of {', '.join(cell_places)}, got {cell!r}")
    return place
