# Packed weights: panels [K][nv * VL] whose columns are interleaved by gate, so that one tile
# holds every gate of the same units. Layout of one direction, all parts in reals and multiples
# of the register width:
#
#   forward   w_ih panels (K = I) | w_hh panels (K = R) | bias [unit vector][plane][lane]
#             | w_hr panels (K = H)
#   backward  w_hh' panels (K = G H, columns R) | w_ih' panels (K = G H, columns I)
#             | w_hr' panels (K = P, columns H)
#   both then | params [parameter][H in whole vectors]
#
# A cell that is not recurrent has no w_hh.

cdef struct Shape:
    Py_ssize_t I, H, P, R       # P = 0: no projection, and R = H
    Cell cell
    # vectors a forward panel is wide, and how many of them are different units
    int nv, units
    Py_ssize_t panels           # forward panels
    Py_ssize_t gate_row         # reals of one row of GATES: panels * units * planes * VL
    Py_ssize_t dgates_row       # reals of one row of DGATES: planes and parameters, H each
    Py_ssize_t params_plane     # H in whole vectors
    Py_ssize_t tile_width       # reals of a row of a cell's tile: 4 vectors, or all units
    Py_ssize_t tail_rows        # rows of a tile that goes through `tail`


cdef struct Packed:             # offsets of the parts, and the whole, in reals
    Py_ssize_t w_ih, w_hh, bias, w_hr, params, total


cdef struct Weights:            # row-major, contiguous; all but w_ih may be NULL
    const real *w_ih            # (G H, I)
    const real *w_hh            # (G H, R)
    const real *b_ih            # (G H)
    const real *b_hh
    const real *w_hr            # (P, H)
    const real *params          # (parameters, H)


cdef Shape shape_of(const Cell *cell, Py_ssize_t I, Py_ssize_t H, Py_ssize_t P) noexcept nogil:
    cdef Shape s
    s.I, s.H, s.P, s.R = I, H, P, P if P > 0 else H
    s.cell = cell[0]
    s.units = 4 // s.cell.gates
    s.nv = s.units * s.cell.gates
    s.panels = ceil_div(H, s.units * VL)
    s.gate_row = s.panels * s.units * s.cell.planes * VL
    s.dgates_row = (s.cell.planes + s.cell.params) * H
    s.params_plane = ceil_div(H, VL) * VL
    s.tile_width = max(s.params_plane, <Py_ssize_t>4 * VL) if s.cell.whole_rows else 4 * VL
    s.tail_rows = 1 if s.cell.whole_rows else MAX_ROWS
    return s


cdef inline Py_ssize_t state_columns(const Shape *s) noexcept nogil:
    """Columns of w_hh."""
    return s.R if s.cell.recurrent else 0


cdef inline Py_ssize_t state_rows(const Shape *s) noexcept nogil:
    """Rows of w_hh."""
    return s.cell.gates * s.H if s.cell.recurrent else 0


cdef Packed packed_forward(const Shape *s) noexcept nogil:
    cdef Packed p
    cdef Py_ssize_t width = s.panels * s.nv * VL
    p.w_ih = 0
    p.w_hh = width * s.I
    p.bias = p.w_hh + width * state_columns(s)
    p.w_hr = p.bias + s.gate_row
    p.params = p.w_hr + ceil_div(s.P, 4 * VL) * 4 * VL * s.H
    p.total = p.params + s.cell.params * s.params_plane
    return p


cdef Packed packed_backward(const Shape *s) noexcept nogil:
    cdef Packed p
    cdef Py_ssize_t width = 4 * VL, K = s.cell.gates * s.H
    p.w_hh = 0
    p.w_ih = ceil_div(s.R, width) * width * state_rows(s)
    p.w_hr = p.w_ih + ceil_div(s.I, width) * width * K
    p.params = p.w_hr + ceil_div(s.H, width) * width * s.P
    p.total = p.params + s.cell.params * s.params_plane
    p.bias = p.total
    return p


cdef inline int plane_gate(const Shape *s, int plane, bint of_input) noexcept nogil:
    """The gate of torch's order in plane `plane` of the input's or the state's share of GATES."""
    if of_input and s.cell.planes == s.cell.gates + 1:  # xn | r | z against r | z | n
        return (plane + s.cell.gates - 1) % s.cell.gates
    return plane


cdef void pack_gates(const Shape *s, const real *w, Py_ssize_t K, bint of_input, Py_ssize_t p0,
                     Py_ssize_t p1, real *dst) noexcept nogil:
    cdef Py_ssize_t panel, unit, gate, width = s.nv * VL
    cdef int j, lane
    cdef const real *source[VL]
    for panel in range(p0, p1):
        for j in range(s.nv):
            gate = plane_gate(s, j % s.cell.gates, of_input)
            for lane in range(VL):
                unit = (panel * s.units + j // s.cell.gates) * VL + lane
                source[lane] = w + (gate * s.H + unit) * K if unit < s.H else NULL
            pack_transposed(source, K, dst + panel * K * width + j * VL, width)


cdef void pack_bias(const Shape *s, const Weights *w, real *dst) noexcept nogil:
    """What a row of GATES starts from: b_ih + b_hh, but apart where hn is."""
    cdef Py_ssize_t plane, unit, first = s.cell.planes - s.cell.gates
    cdef real *at
    memset(dst, 0, s.gate_row * sizeof(real))
    if w.b_ih == NULL:
        return
    for unit in range(s.H):
        for plane in range(s.cell.planes):
            at = dst + ((unit // VL) * s.cell.planes + plane) * VL + unit % VL
            if plane < s.cell.gates:
                at[0] = w.b_ih[plane_gate(s, plane, True) * s.H + unit]
            if plane >= first:
                at[0] += (0 if w.b_hh == NULL
                          else w.b_hh[plane_gate(s, plane - first, False) * s.H + unit])


cdef void pack_params(const Shape *s, const Weights *w, real *dst) noexcept nogil:
    cdef Py_ssize_t k
    for k in range(s.cell.params):
        copy_padded(dst + k * s.params_plane, w.params + k * s.H, s.H, s.params_plane)


cdef void pack_rows(const real **row, Py_ssize_t K, Py_ssize_t columns, Py_ssize_t p0,
                    Py_ssize_t p1, real *dst) noexcept nogil:
    """Panels of K rows as they are: dst[panel][k][:] = row[k][panel's columns].
    Rows are read in one go."""
    cdef Py_ssize_t width = 4 * VL, panel, k
    for k in range(K):
        for panel in range(p0, p1):
            copy_padded(dst + (panel * K + k) * width, row[k] + panel * width,
                        imin(width, columns - panel * width), width)


cdef void pack_projection(const Shape *s, const real *w_hr, real *dst) noexcept nogil:
    cdef Py_ssize_t panel, column, width = 4 * VL
    cdef int j, lane
    cdef const real *source[VL]
    for panel in range(ceil_div(s.P, width)):
        for j in range(4):
            for lane in range(VL):
                column = panel * width + j * VL + lane
                source[lane] = w_hr + column * s.H if column < s.P else NULL
            pack_transposed(source, s.H, dst + panel * s.H * width + j * VL, width)


cdef void pack_forward(const Shape *s, const Weights *w, real *dst, int rank,
                       int size) noexcept nogil:
    cdef Packed p = packed_forward(s)
    cdef Py_ssize_t p0 = share(s.panels, rank, size), p1 = share(s.panels, rank + 1, size)
    pack_gates(s, w.w_ih, s.I, True, p0, p1, dst + p.w_ih)
    pack_gates(s, w.w_hh, state_columns(s), False, p0, p1, dst + p.w_hh)
    if rank == 0:
        pack_bias(s, w, dst + p.bias)
        pack_params(s, w, dst + p.params)
        if s.P > 0:
            pack_projection(s, w.w_hr, dst + p.w_hr)


cdef void pack_backward(const Shape *s, const Weights *w, real *dst, const real **row, int rank,
                        int size) noexcept nogil:
    """`row` is scratch for max(G H, P) pointers."""
    cdef Packed p = packed_backward(s)
    cdef Py_ssize_t k, K = s.cell.gates * s.H, n
    # the state's planes stand as the input's in forward: dhn | dr | dz
    for k in range(state_rows(s)):
        row[k] = w.w_hh + (plane_gate(s, <int>(k // s.H), True) * s.H + k % s.H) * s.R
    n = ceil_div(s.R, 4 * VL)
    pack_rows(row, state_rows(s), s.R, share(n, rank, size), share(n, rank + 1, size), dst + p.w_hh)
    # the input's planes dr | dz | dxn are torch's order
    for k in range(K):
        row[k] = w.w_ih + k * s.I
    n = ceil_div(s.I, 4 * VL)
    pack_rows(row, K, s.I, share(n, rank, size), share(n, rank + 1, size), dst + p.w_ih)
    if rank == 0:
        pack_params(s, w, dst + p.params)
    if s.P > 0:
        for k in range(s.P):
            row[k] = w.w_hr + k * s.H
        n = ceil_div(s.H, 4 * VL)
        pack_rows(row, s.P, s.H, share(n, rank, size), share(n, rank + 1, size), dst + p.w_hr)
