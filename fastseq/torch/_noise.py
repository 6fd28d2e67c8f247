"""Recurrent dropout and zoneout of the modules: probabilities checked, masks drawn."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastseq._spec import Kind, Masks, Spec


class Noise(NamedTuple):
    """A module's probabilities: of recurrent dropout, and of zoneout of h and of c."""

    recurrent_dropout: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0

    @classmethod
    def checked(cls, op: str, kind: Kind, recurrent_dropout, zoneout) -> "Noise | None":
        """From the constructor's arguments; zoneout is one number or two, of h and of c. None: no
        noise."""
        of_h, of_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout * kind.has_c)
        found = {"recurrent_dropout": recurrent_dropout, "zoneout": of_h, "zoneout of c": of_c}
        for name, p in found.items():
            if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
                raise ValueError(f"{op}: {name} must be a probability below 1, got {p!r}")
        if of_c and not kind.has_c:
            raise ValueError(f"{op}: zoneout of c must be 0: the cell has no c, got {of_c}")
        if recurrent_dropout and not kind.recurrent:
            text = "recurrent_dropout must be 0: the cell has no w_hh"
            raise ValueError(f"{op}: {text}, got {recurrent_dropout}")
        return cls(*map(float, found.values())) if any(found.values()) else None

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
