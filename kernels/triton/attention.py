"""Fused attention on the GPU: what is launched, with which block sizes.

Takes an `Attention` of kernels/cpu/contract.py whose arrays are tensors of one device and dtype
(float32, bfloat16, float16; lse, dlse float32), checked. Other than there
    q_lengths, kv_lengths    None for full ones; the values are clamped to 0..L, 0..S
    q_first, k_first         packed rows: cu_seqlens (B + 1,)
    mask, bias               broadcast by strides of 0, never expanded in memory

Files: attention_tiles.py rows, tiles, products; attention_scores.py reach, scores, dropout;
attention_forward.py, attention_decode.py, attention_backward.py, attention_bias.py the kernels.
Sums have a fixed order: results are bitwise the same from run to run, and no row's depend on B.
"""

from __future__ import annotations

import torch
from fastseq.kernels.cpu.contract import NO_LIMIT, Attention

from .attention_backward import attention_delta, attention_dkv, attention_dq
from .attention_bias import attention_dbias
from .attention_decode import attention_decode, attention_merge
from .attention_forward import attention_fwd
from .attention_scores import Options
from .launch import Row, cdiv, choose, on, precision

INF = float("inf")
WIDEST = 256  # head dims above are taken in chunks of CHUNK columns
CHUNK = 128


def _row(size, itemsize, arch, M, N, warps, stages):
    meta = {"BLOCK_M": M, "BLOCK_N": N, "num_warps": warps, "num_stages": stages}
    return Row(size, itemsize, arch, meta)


# By the larger of D and DV; queries by keys. Chosen without a GPU: what FlexAttention ships for the
# same loops (torch/_inductor/template_heuristics/triton.py, torch 2.13), reduced until ptxas spills
# little (sm_90). _PAIRS: with a mask or a bias, whose tiles take registers.
FORWARD = [
    _row(64, 2, 90, 128, 128, 8, 3),
    _row(128, 2, 90, 128, 64, 8, 3),
    _row(INF, 2, 90, 128, 64, 8, 2),
    _row(64, 2, 0, 64, 64, 4, 2),
    _row(INF, 2, 0, 64, 32, 4, 2),
    _row(128, 4, 0, 64, 32, 8, 2),
    _row(INF, 4, 0, 32, 32, 8, 1),
]
FORWARD_PAIRS = [
    _row(64, 2, 0, 64, 64, 4, 2),
    _row(INF, 2, 0, 64, 32, 4, 2),
    _row(128, 4, 0, 64, 32, 8, 2),
    _row(INF, 4, 0, 32, 32, 8, 1),
]
DECODE = [
    _row(128, 2, 0, None, 64, 4, 3),
    _row(INF, 2, 0, None, 32, 4, 2),
    _row(INF, 4, 0, None, 32, 4, 2),
]
DQ = [
    _row(64, 2, 90, 128, 64, 8, 3),
    _row(128, 2, 90, 128, 64, 8, 2),
    _row(INF, 2, 90, 64, 32, 8, 2),
    _row(INF, 2, 0, 64, 32, 4, 1),
    _row(128, 4, 0, 32, 32, 8, 1),
    _row(INF, 4, 0, 16, 32, 8, 1),
]
DQ_PAIRS = [_row(128, 2, 90, 64, 64, 8, 2), *DQ]
DKV = [
    _row(64, 2, 90, 64, 128, 8, 3),
    _row(128, 2, 90, 32, 128, 8, 3),
    _row(INF, 2, 90, 32, 64, 8, 1),
    _row(INF, 2, 0, 32, 64, 4, 1),
    _row(128, 4, 0, 32, 32, 8, 1),
    _row(INF, 4, 90, 32, 16, 8, 1),
    _row(INF, 4, 0, 16, 16, 4, 1),
]
FEW_ROWS = 64  # queries of a group of heads, up to which the keys are split
SPAN = 256  # keys of a split, at least
MAX_SPLITS = 128


def block(width: int) -> int:
    """Columns of a tile: all of a head dim that is not too wide, as a power of two."""
    return max(16, 1 << (width - 1).bit_length()) if width <= WIDEST else CHUNK


def _strided(t: torch.Tensor | None, axes: int = 3):
    """(pointer, strides of the first axes), or None; the stride of an axis of size 1 is 0."""
    if t is None:
        return None
    strides = zip(t.shape[:axes], t.stride()[:axes], strict=True)
    return t, *(0 if n == 1 else stride for n, stride in strides)


def _limit(side: int) -> int | None:
    return None if side >= NO_LIMIT else max(min(side, 2**31 - 1), -(2**31))


def _options(call: Attention) -> Options:
    right = min(call.right, 0) if call.causal else call.right
    return Options(
        mask=_strided(call.mask, 4),
        bias=_strided(call.bias, 4),
        slopes=_strided(call.alibi_slopes, 2),
        q_lengths=call.q_lengths,
        kv_lengths=call.kv_lengths,
        cu_q=call.q_first,
        cu_k=call.k_first,
        left=_limit(call.left),
        right=_limit(right),
        scale=float(call.scale),
        softcap=call.softcap or None,
        dropout=(call.threshold, float(call.keep_scale)) if call.threshold else None,
    )


def _blocks(call: Attention, rows: int, size: int) -> tuple[int, int]:
    """Blocks of a head, if packed at most and of all sequences; how many times they repeat."""
    B = call.sizes[0]
    return (cdiv(rows, size), B) if call.q_first is None else (rows // size + B, 1)


def _common(call: Attention) -> dict:
    """The constants that are the same for every kernel."""
    _, _, _, D, DV = call.sizes
    return {
        "BOTTOM_RIGHT": call.causal == 2,
        "D": D,
        "DV": DV,
        "PRECISION": precision(call.q.dtype),
        "BLOCK_D": block(D),
        "BLOCK_V": block(DV),
    }


def _chunks(*widths: int) -> int:
    return max(1, *(cdiv(width, block(width)) for width in widths))


def _table(call: Attention, plain, pairs):
    return plain if call.mask is None and call.bias is None else pairs


def forward(call: Attention) -> None:
    """Write o and lse."""
    _, NH, NK, D, DV = call.sizes
    if not call.lse.numel() or not call.sizes[0]:
        return
    with on(call.q):
        if call.q_first is None and call.q.shape[2] * (NH // NK) <= FEW_ROWS:
            _decode(call)
        else:
            meta = choose(_table(call, FORWARD, FORWARD_PAIRS), max(D, DV), call.q)
            _forward(call, meta)


def _forward(call: Attention, meta: dict) -> None:
    B, NH, NK, _, DV = call.sizes
    L, S = call.q.shape[2], call.k.shape[2]
    blocks, repeats = _blocks(call, L, meta["BLOCK_M"])
    arrays = (_strided(t) for t in (call.q, call.k, call.v, call.o, call.lse))
    attention_fwd[(blocks * NH * repeats, _chunks(DV))](
        *arrays, _options(call), B, NH, NH // NK, L, S, blocks, call.seed,
        **_common(call), **meta,
    )  # fmt: skip


def _decode(call: Attention) -> None:
    """Few queries: split over the keys, then merged."""
    B, NH, NK, D, DV = call.sizes
    L, S, group = call.q.shape[2], call.k.shape[2], NH // NK
    meta = choose(DECODE, max(D, DV), call.q)
    meta = meta | {"BLOCK_M": min(FEW_ROWS, max(16, 1 << (group - 1).bit_length()))}
    span = max(meta["BLOCK_N"], SPAN, 1 << (cdiv(S, MAX_SPLITS) - 1).bit_length())
    splits = max(1, cdiv(S, span))
    part, part_lse = call.o.unsqueeze(3), call.lse.unsqueeze(3)
    if splits > 1:
        part = call.o.new_empty(B, NH, L, splits, DV, dtype=torch.float32)
        part_lse = call.lse.new_empty(B, NH, L, splits)
    blocks = cdiv(group * L, meta["BLOCK_M"])
    attention_decode[(splits * blocks * NK * B, _chunks(DV))](
        *(_strided(t) for t in (call.q, call.k, call.v)),
        _strided(part, 4), _strided(part_lse, 4), _options(call),
        B, NH, group, L, S, splits, span, blocks, call.seed, **_common(call), **meta,
    )  # fmt: skip
    if splits > 1:
        attention_merge[(L * NH * B, _chunks(DV))](
            _strided(part, 4), _strided(part_lse, 4), _strided(call.o), _strided(call.lse),
            NH, L, splits, DV=DV, BLOCK_S=MAX_SPLITS, BLOCK_V=block(DV),
        )  # fmt: skip


def backward(call: Attention) -> None:
    """Write dq, dk, dv, and dbias (in the shape of the bias before it was broadcast) if wanted."""
    B, NH, NK, D, DV = call.sizes
    L, S, size = call.q.shape[2], call.k.shape[2], max(D, DV)
    if not (L and S and B and NH):
        for gradient in (call.dq, call.dk, call.dv, call.dbias):
            if gradient is not None:
                gradient.zero_()
        return
    with on(call.q):
        delta = _delta(call)
        read = (call.q, call.k, call.v, call.do, call.lse, delta)
        arrays = [_strided(t) for t in read]
        options, common = _options(call), _common(call)
        meta = choose(_table(call, DQ, DQ_PAIRS), size, call.q)
        blocks, repeats = _blocks(call, L, meta["BLOCK_M"])
        attention_dq[(blocks * NH * repeats, _chunks(D))](
            *arrays, _strided(call.dq), options, B, NH, NH // NK, L, S, blocks, call.seed,
            **common, **meta,
        )  # fmt: skip
        meta = choose(DKV, size, call.q)
        blocks, repeats = _blocks(call, S, meta["BLOCK_N"])
        attention_dkv[(blocks * NK * repeats, _chunks(D, DV))](
            *arrays, _strided(call.dk), _strided(call.dv), options, B, NK, NH // NK, L, S, blocks,
            call.seed, **common, **meta,
        )  # fmt: skip
        if call.dbias is not None:
            _dbias(call, arrays, options, common)


def _delta(call: Attention) -> torch.Tensor:
    (heads, L), DV = call.lse.shape[1:], call.sizes[4]
    delta = call.lse.new_empty(call.lse.shape)
    meta = {"BLOCK_M": 16, "BLOCK_V": block(DV)}
    arrays = (call.o, call.do, call.lse, call.dlse, delta)
    blocks = cdiv(L, meta["BLOCK_M"])
    attention_delta[(blocks * heads * call.lse.shape[0],)](
        *(_strided(t) for t in arrays), heads, L, blocks, DV=DV, **meta
    )
    return delta


def _dbias(call: Attention, arrays: list, options: Options, common: dict) -> None:
    B, NH, NK, D, DV = call.sizes
    L, S = call.q.shape[2], call.k.shape[2]
    meta = choose(DKV, max(D, DV), call.q)
    shape = (1,) * (4 - call.dbias.dim()) + tuple(call.dbias.shape)
    blocks = cdiv(L, meta["BLOCK_M"]), cdiv(S, meta["BLOCK_N"])
    sum_i, sum_j = shape[2] != L, shape[3] != S
    parts = (*shape[:2], blocks[0] if sum_i else L, blocks[1] if sum_j else S)
    summed = call.dbias.view(shape)
    if sum_i or sum_j:
        summed = torch.empty(parts, dtype=torch.float32, device=call.q.device)
    attention_dbias[(blocks[0] * blocks[1] * shape[0] * shape[1],)](
        *arrays, _strided(summed, 4), options, NH, NH // NK, L, S,
        shape[1], B // shape[0], NH // shape[1], call.seed,
        SUM_I=sum_i, SUM_J=sum_j, **common, **meta,
    )  # fmt: skip
    axes = [axis for axis, summed_up in ((2, sum_i), (3, sum_j)) if summed_up]
    if axes:
        call.dbias.copy_(summed.sum(axes, keepdim=True).view(call.dbias.shape))
