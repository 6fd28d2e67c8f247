# cython: language_level=3, boundscheck=False, wraparound=False
# cython: cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""The recurrent kernels: RNN, GRU, LSTM and users' scans, forward and backward through time.

Built once per ISA level and dtype from this one source (see setup.py). `contract.Scan` lists the
arguments.
"""

include "base.pxi"


cdef extern from "cells.h" nogil:
    enum:
        SLOTS
    enum:
        GATES, H_PREV, C_PREV, H, C
        DH_PRODUCT, DY, DC_EXTERNAL, DH_IN, DC_IN, DGATES, DH_OUT, DC_OUT
    ctypedef struct Functions:
        pass
    const Functions functions
    ctypedef struct Tile:
        Py_ssize_t rows, blocks, dgates_plane, params_plane
        const real *params
        const Functions *functions
        real *row[13][8]
        Py_ssize_t units
    ctypedef void (*CellFn)(const Tile *) noexcept nogil
    ctypedef struct Cell:
        int gates, planes, has_c, saves_gates, dh_direct, recurrent, params, whole_rows
        CellFn forward, backward
    Cell cell_of(int which)


include "pack.pxi"
include "product.pxi"
include "scan.pxi"
include "regularise.pxi"
include "scan_forward.pxi"
include "scan_backward_rows.pxi"
include "scan_backward.pxi"
include "scan_gradients.pxi"
include "entry.pxi"
include "pack_entry.pxi"
