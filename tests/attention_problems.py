"""Random attention problems, and two judges that solve them: the reference, and torch.

As in `problems.py`: a test solves an `AttentionProblem` with the code under test and holds outputs
and gradients against `solve_reference` (float64), with the room that `solve_torch` leaves.
torch is imported on first use only.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from problems import Drawn, Result, cast

from fastseq.reference import attention as reference

TORCH_MODS = {}  # of a score_mod, the same function for tensors: score_mod_problems.py
SEED = 0x9E1D_5C3A_7B24_F806  # above 2^63: every bit of the seed is used

# Fields of an AttentionProblem: each option alone, and one with all of them
OPTIONS = [
    {"causal": True},
    {"causal": "top_left"},
    {"causal": "bottom_right"},
    {"window": (2, 1)},
    {"window": (None, 0)},
    {"window": (1, None)},
    {"mask": "BxNHxLxS"},
    {"mask": "Bx1x1xS"},
    {"bias": "BxNHxLxS"},
    {"bias": "LxS"},
    {"bias": "NHxLx1"},
    {"ragged": "q"},
    {"ragged": "kv"},
    {"ragged": "qkv"},
    {"scale": -0.4},
    {"softcap": 0.8},
    {"alibi": "NH"},
    {"alibi": "BxNH"},
    {"dropout_p": 0.3},
    {"NH": 6, "NK": 2},
    {"NH": 4, "NK": 1},
]
ALL_OPTIONS = {
    **{"B": 5, "NH": 4, "NK": 2, "causal": "bottom_right", "window": (4, 1), "ragged": "qkv"},
    **{"mask": "BxNHxLxS", "bias": "NHxLxS", "scale": 0.9, "softcap": 2.5, "alibi": "BxNH"},
    "dropout_p": 0.2,
}


def option_pairs():
    """Fields that turn two of OPTIONS on, for all that do not exclude each other."""
    return [a | b for a, b in combinations(OPTIONS, 2) if not a.keys() & b.keys()]


@dataclass(frozen=True)
class AttentionProblem(Drawn):
    """One call of attention, its arrays drawn at random, always the same for the same fields.

    mask, bias, alibi: None or the shape given, as "BxNHxLxS", "LxS", "Bx1x1xS"; a mask is True for
    three quarters, row L // 2 attends nothing; a tenth of a bias is -inf. ragged: "q", "kv", "qkv",
    which lengths are given: half, all, 0, 1 of the keys, the rest random; queries in turned order.
    The arrays are read-only and of the problem's dtype; a judge casts these same values to its own.
    """

    B: int = 2
    NH: int = 3
    NK: int = 3
    L: int = 5
    S: int = 7
    D: int = 3
    DV: int = 6
    dtype: str = "float64"
    causal: bool | str = False
    window: tuple | None = None
    mask: str | None = None
    bias: str | None = None
    ragged: str | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None
    dropout_p: float = 0.0

    def __str__(self):
        sizes = "-".join(f"{n}{getattr(self, n)}" for n in ("B", "NH", "NK", "L", "S", "D", "DV"))
        short = {"float64": "f64", "float32": "f32"}.get(self.dtype, self.dtype)
        causal = {True: "causal"}.get(self.causal, self.causal)
        window = "_".join("inf" if side is None else str(side) for side in self.window or ())
        given = {
            causal: self.causal,
            f"window{window}": self.window,
            f"mask{self.mask}": self.mask,
            f"bias{self.bias}": self.bias,
            f"ragged_{self.ragged}": self.ragged,
            f"scale{self.scale}": self.scale is not None,
            f"softcap{self.softcap}": self.softcap,
            f"alibi{self.alibi}": self.alibi,
            f"dropout{self.dropout_p}": self.dropout_p,
        }
        return "-".join([sizes, short, *(name for name, on in given.items() if on)])

    def _shape(self, names):
        return tuple(1 if n == "1" else getattr(self, n) for n in names.split("x"))

    @cached_property
    def inputs(self):
        """The differentiable arguments by name."""
        B, NK, S = self.B, self.NK, self.S
        shapes = {
            "q": (B, self.NH, self.L, self.D),
            "k": (B, NK, S, self.D),
            "v": (B, NK, S, self.DV),
        }
        rng = self._rng("inputs")
        inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        if self.bias:
            bias = rng.standard_normal(self._shape(self.bias))
            inputs["bias"] = np.where(rng.random(bias.shape) < 0.1, -np.inf, bias)
        return self._freeze(inputs)

    @cached_property
    def options(self):
        """The other keyword arguments of the public function."""
        rng = self._rng("options")
        options = {"causal": self.causal, "window": self.window}
        options |= {"scale": self.scale, "softcap": self.softcap}
        if self.mask:
            mask = rng.random(self._shape(self.mask)) < 0.75
            if mask.ndim > 1 and mask.shape[-2] > 1:
                mask[..., self.L // 2, :] = False
            options["mask"] = mask
        for name, size in {"q": self.L, "kv": self.S}.items():
            first = [size // 2, size, 0, min(1, size)]
            if name in {"q": ["q"], "kv": ["kv"], "qkv": ["q", "kv"]}.get(self.ragged, []):
                drawn = [*first, *rng.integers(0, size + 1, self.B)][: self.B]
                options[f"{name}_lengths"] = np.array(
                    drawn[::-1] if name == "q" else drawn, dtype=int
                )
        if self.alibi:
            slopes = rng.uniform(0.05, 1, self._shape(self.alibi))
            options["alibi_slopes"] = slopes.astype(self.dtype)
        if self.dropout_p:
            options |= {"dropout_p": self.dropout_p, "seed": SEED}
        return options

    @cached_property
    def cotangents(self):
        """The gradients of the outputs: do, dlse."""
        rng, rows = self._rng("cotangents"), (self.B, self.NH, self.L)
        return self._freeze(
            {"do": rng.standard_normal((*rows, self.DV)), "dlse": rng.standard_normal(rows)}
        )


def solve_reference(problem, dtype="float64"):
    """The reference's Result: outputs o, lse, gradients as in AttentionProblem.inputs."""
    inputs, cotangents = cast(problem.inputs, dtype), cast(problem.cotangents, dtype)
    o, lse = reference.attention(**inputs, **problem.options)
    grads = reference.attention_vjp(**inputs, **problem.options, **cotangents)
    return Result({"o": o, "lse": lse}, grads)


def solve_torch(problem, dtype=None):
    """torch's Result by autograd, in the problem's dtype unless given: the equations one by one.

    Only the numbers of dropout are the reference's; torch has no way to draw them.
    """
    import torch

    dtype = dtype or problem.dtype
    leaves = {
        name: torch.tensor(a, requires_grad=True) for name, a in cast(problem.inputs, dtype).items()
    }
    cotangents = {name: torch.tensor(a) for name, a in cast(problem.cotangents, dtype).items()}
    o, lse, has_key = _torch_attention(leaves, problem.options)
    loss = (cotangents["do"] * o).sum() + (cotangents["dlse"] * lse)[has_key].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return Result(
        {"o": o.detach().numpy(), "lse": lse.detach().numpy()},
        {name: a.numpy() for name, a in zip(leaves, grads, strict=True)},
    )


def _torch_attention(leaves, options):
    """o, lse, has_key (B, NH, L)"""
    import torch

    q, bias = leaves["q"], leaves.get("bias")
    k, v = (leaves[n].repeat_interleave(q.shape[1] // leaves[n].shape[1], dim=1) for n in "kv")
    scale, softcap = options.get("scale"), options.get("softcap")
    s = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if options.get("score_mod") is not None:
        B, NH, L, S = (torch.arange(n, dtype=q.dtype) for n in s.shape)
        at = (B[:, None, None, None], NH[:, None, None], L[:, None], S)
        s = TORCH_MODS[options["score_mod"]](s, *at)
    diagonal, allowed = _torch_geometry(*s.shape[::2], s.shape[3], options)
    if options.get("alibi_slopes") is not None:
        slopes = torch.tensor(options["alibi_slopes"], dtype=q.dtype)[..., None, None]
        s = s - slopes * (diagonal - torch.arange(s.shape[3])).abs().to(q.dtype)
    if bias is not None:
        s, allowed = s + bias, allowed & (bias != -torch.inf)
    if options.get("mask") is not None:
        allowed = allowed & torch.tensor(options["mask"])
    s = s.masked_fill(~allowed, -torch.inf)
    has_key = (s != -torch.inf).any(dim=-1)
    # a row without a key: softmax of zeros, thrown away, so that its gradient is no NaN
    p = s.masked_fill(~has_key[..., None], 0).softmax(dim=-1) * has_key[..., None]
    if options.get("dropout_p"):
        keep = reference.dropout_keep(options["seed"], *s.shape, options["dropout_p"])
        p = p * torch.tensor(keep) / (1 - options["dropout_p"])
    return p @ v, s.logsumexp(dim=-1), has_key


def _torch_geometry(B, L, S, options):
    """The diagonal i + offset (B, 1, L, 1), and allowed (B, 1, L, S), mask and bias aside."""
    import torch

    i, j = torch.arange(L)[:, None], torch.arange(S)
    q_lengths = torch.tensor(options.get("q_lengths", [L] * B)).reshape(B, 1, 1, 1)
    kv_lengths = torch.tensor(options.get("kv_lengths", [S] * B)).reshape(B, 1, 1, 1)
    diagonal = i + torch.zeros_like(q_lengths)
    if options["causal"] == "bottom_right":
        diagonal = i + kv_lengths - q_lengths
    allowed = (i < q_lengths) & (j < kv_lengths)
    if options["causal"]:
        allowed &= j <= diagonal
    left, right = options["window"] or (None, None)
    if left is not None:
        allowed &= diagonal - left <= j
    if right is not None:
        allowed &= j <= diagonal + right
    return diagonal, allowed
