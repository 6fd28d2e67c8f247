"""Keys and values of decoding, kept as tensors between steps."""

import torch
from torch import Tensor

from fastseq.torch._tensors import FLOATS, GPU_FLOATS

_APPEND = "KVCache.append"


class KVCache:
    """Keys and values of decoding, in memory allocated once; every batch row has its own length.

        attention(q, cache.k, cache.v, kv_lengths=cache.lengths, causal="bottom_right")

    No gradient flows through the cache: what is appended is copied.

    Args:
        B: batch rows.
        NK: key/value heads.
        capacity: the most keys of a row.
        D: head dim of keys.
        DV: head dim of values; None: D.
        dtype: torch.float32 or torch.float64; on a GPU float32, bfloat16 or float16 of torch.
        device: of k, v, lengths and what is appended. On a GPU an append waits for the lengths.

    Attributes:
        k (B, NK, capacity, D), v (B, NK, capacity, DV).
        lengths (B,) int64: what each row holds.
    """

    def __init__(
        self,
        B: int,
        NK: int,
        capacity: int,
        D: int,
        DV: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if torch.device(device).type == "cuda":
            if dtype not in GPU_FLOATS:
                expected = ", ".join(map(str, GPU_FLOATS))
                raise TypeError(f"KVCache: dtype must be one of {expected}, got {dtype}")
        elif dtype not in FLOATS:
            raise TypeError(f"KVCache: dtype must be torch.float32 or torch.float64, got {dtype}")
        self.k = torch.zeros(B, NK, capacity, D, dtype=dtype, device=device)
        self.v = torch.zeros(B, NK, capacity, D if DV is None else DV, dtype=dtype, device=device)
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)

    def append(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """Write k (B, NK, n, D) and v (B, NK, n, DV) behind what each batch row holds.

        counts (B,): how many of the n each row takes, None for all. Raises TypeError or ValueError,
        and writes nothing, if an argument does not fit or a row would exceed the capacity.
        """
        capacity, n = self.k.shape[2], k.shape[2] if k.dim() == 4 else 0
        _check_rows("k", "D", k, self.k, n)
        _check_rows("v", "DV", v, self.v, n)
        if k.requires_grad or v.requires_grad:
            k, v = k.detach(), v.detach()
        starts = set(self.lengths.tolist() if counts is None else ())
        start = starts.pop() if len(starts) == 1 else capacity + 1
        if start + n <= capacity:  # the usual step, 6 times as fast (2-core Zen 3)
            self.k[:, :, start : start + n] = k
            self.v[:, :, start : start + n] = v
            self.lengths = self.lengths + n
            return
        taken = torch.full_like(self.lengths, n) if counts is None else counts
        self._check_counts(_APPEND, "counts", taken, "0..n", torch.full_like(self.lengths, n))
        after = self.lengths + taken
        if after.gt(capacity).any():
            b = int(after.gt(capacity).nonzero()[0])
            raise ValueError(
                f"{_APPEND}: capacity = {capacity}, row {b} holds {self.lengths[b]} "
                f"and was given {taken[b]}"
            )
        steps = torch.arange(n, device=taken.device)
        row, i = (steps < taken.unsqueeze(1)).nonzero(as_tuple=True)
        at = self.lengths[row] + i
        for given, held in ((k, self.k), (v, self.v)):
            held[row, :, at] = given[row, :, i]
        self.lengths = after

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past lengths (B,), of which none exceeds what the row holds."""
        self._check_counts("KVCache.truncate", "lengths", lengths, "0..held", self.lengths)
        self.lengths = lengths.to(torch.int64, copy=True)

    def _check_counts(self, op, name, given, letters, most):
        if given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(f"{op}: {name} must be integers, got {given.dtype}")
        if given.shape != most.shape:
            got = tuple(given.shape)
            raise ValueError(f"{op}: {name} must be (B,) = {tuple(most.shape)}, got {got}")
        outside = (given < 0) | (given > most)
        if outside.any():
            b = int(outside.nonzero()[0])
            expected = f"{letters} = 0..{most[b]}"
            raise ValueError(f"{op}: {name} must be in {expected}, got {name}[{b}] = {given[b]}")


def _check_rows(name, letter, given, held, n):
    """n rows for every head of the cache, of its dtype."""
    B, NK, _, D = held.shape
    if given.shape != (B, NK, n, D):
        expected, got = (B, NK, n, D), tuple(given.shape)
        letters = f"(B, NK, n, {letter})"
        raise ValueError(f"{_APPEND}: {name} must be {letters} = {expected}, got {got}")
    if given.dtype is not held.dtype:
        raise TypeError(f"{_APPEND}: {name} must be {held.dtype}, got {given.dtype}")
