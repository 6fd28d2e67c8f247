"""Recurrent dropout and zoneout of the modules: probabilities checked, masks drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq._spec import Kind, Masks, Spec


class NoiseRates(NamedTuple):
    """A module's probabilities: of recurrent dropout, and of zoneout of h and of c."""

    recurrent_dropout: float
    zoneout_h: float
    zoneout_c: float

    @classmethod
    def checked(
        cls, op: str, kind: Kind, recurrent_dropout: Any, zoneout: Any
    ) -> NoiseRates | None:
        """From the constructor's arguments; None where all are 0."""
        _check(op, "recurrent_dropout", "a probability below 1", recurrent_dropout)
        pair = isinstance(zoneout, tuple | list) and len(zoneout) == 2
        of_h, of_c = zoneout if pair else (zoneout, zoneout)
        for p in (of_h, of_c):
            _check(op, "zoneout", "a probability below 1, or two (of h, of c)", p, zoneout)
        if not kind.has_c and pair and of_c:
            raise ValueError(f"{op}: zoneout of c must be 0: the cell has no c, got {of_c}")
        if recurrent_dropout and not kind.recurrent:
            text = "recurrent_dropout must be 0: the cell has no w_hh"
            raise ValueError(f"{op}: {text}, got {recurrent_dropout}")
        rates = float(recurrent_dropout), float(of_h), float(of_c) if kind.has_c else 0.0
        return cls(*rates) if any(rates) else None

    def __str__(self) -> str:
        """As the constructor takes them."""
        found = f", recurrent_dropout={self.recurrent_dropout}" if self.recurrent_dropout else ""
        return found + (f", zoneout={self[1:]}" if self.zoneout else "")

    @property
    def zoneout(self) -> bool:
        return self.zoneout_h > 0 or self.zoneout_c > 0

    def masks(self, spec: Spec, x: Tensor, R: int, training: bool) -> Masks:
        """Drawn for x (T, B, I) with torch's generator, for all scans of a module at once; in
        inference zoneout is its mean."""
        found = {}
        T, B, S = *x.shape[:2], spec.scans
        if training and self.recurrent_dropout:
            ones = x.new_ones(S, B, R)
            found["recurrent_mask"] = torch.dropout(ones, self.recurrent_dropout, True)
        for name in ("zoneout_h", "zoneout_c"):
            if p := getattr(self, name):
                mask = x.new_full((S, T, B, R), p)
                found[name] = mask.bernoulli() if training else mask
        return Masks(**found)


def _check(op: str, name: str, expected: str, p: Any, given: Any = None) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
        raise ValueError(f"{op}: {name} must be {expected}, got {p if given is None else given!r}")
