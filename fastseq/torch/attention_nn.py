"""torch.nn.MultiheadAttention on fastseq's kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import score_mods
from fastseq.torch.attention import attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: attention of several heads between two projections.

        head_h = softmax(Q_h K_h^T / sqrt(E / heads)) V_h      Q = q W_q^T + b_q, K and V alike
        output = [head_1 ... head_n] W_o^T + b_o

    Parameters, initial values under a seed and state_dict keys are those of torch.nn. Masks are
    torch.nn's: bool True means masked out, float is added. They are never expanded to
    (N * heads, L, S), unless weights are asked for: need_weights=False is the fused path, True
    (torch's default) forms the weights by torch's operators. Other than in torch.nn
    - a query whose keys are all masked out has weights 0 and output b_o in both paths, where
      torch.nn gives NaN with need_weights=True;
    - is_causal=True stands for attn_mask only where no key is added (add_bias_kv, add_zero_attn);
      torch.nn would hide those keys;
    - masks of different dtypes go together without a warning.

    Args: those of torch.nn.MultiheadAttention in its order, and by name score_mod: a function of
        the scores made by `fastseq.score_mod`, or None; the masks follow on its result, and
        need_weights must be False with it.
    Raises: AssertionError, RuntimeError, ValueError where torch.nn.MultiheadAttention raises them;
        TypeError for parameters that are not float32 or float64 on the CPU.
    Equivalent to: torch.nn.MultiheadAttention(*args, **kwargs).
    Accuracy, Source: `fastseq.torch.attention`. Cost: that, and 2 E (E + kdim + vdim + E) FLOP a
        row in torch.nn.functional.linear.
    """

    def __init__(self, *args, score_mod: score_mods.ScoreMod | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._adopt(score_mod)

    def _adopt(self, score_mod=None):
        """What the module has beside torch.nn's attributes."""
        self.score_mod = score_mods.found("MultiheadAttention", score_mod)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query on key and value.

        Args:
            query: (L, N, E), with batch_first (N, L, E), unbatched (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,) bool, True = masked out, or float, added to scores.
            need_weights: also return the weights, which then exist as a whole.
            attn_mask: (L, S) or (N * heads, L, S), bool or float as key_padding_mask.
            average_attn_weights: the mean of the weights over the heads.
            is_causal: attn_mask, which must be given, is the causal mask.

        Returns:
            output, as query, and None or the weights (N, L, S), not averaged (N, heads, L, S),
            unbatched without N.
        """
        batched = self._batched(query, key, value, key_padding_mask, attn_mask)
        if any(t.is_nested for t in (query, key, value)):
            raise AssertionError("MultiheadAttention does not support NestedTensor")
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if need_weights and self.score_mod is not None:
            raise ValueError("MultiheadAttention: need_weights must be False with a score_mod")
        alike = 3 if query is key and key is value else 2 if key is value else 1
        rows = 1 if self.batch_first and batched else 0  # the axis of L and S
        if not batched:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        self._check(query, key, value, rows)
        q, k, v, added = self._heads(query, key, value, alike, rows)
        causal = is_causal and not need_weights and not added
        masks = (None if causal else attn_mask, key_padding_mask)
        mask, bias = self._masks(*masks, q, k.shape[2] - added, added)
        p = self.dropout if self.training else 0.0
        if need_weights:
            o, weights = _attend_with_weights(q, k, v, mask, bias, p)
        else:
            mod = self.score_mod
            o = attention(
                q, k, v, mask=mask, bias=bias, causal=causal, score_mod=mod, dropout_p=p
            )  # fmt: skip
            weights = None
        o = (o.transpose(1, 2) if rows else o.permute(2, 0, 1, 3)).flatten(2)
        output = F.linear(o, self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            output, weights = output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output, weights

    def _batched(self, query, key, value, key_padding_mask, attn_mask):
        """Whether there is an axis of N; the numbers of axes agree."""
        n = query.dim()
        if n not in (2, 3):
            raise AssertionError(f"query should be unbatched 2D or batched 3D, got {n}D")
        given = {"key": (key, (n,)), "value": (value, (n,))}
        given["key_padding_mask"] = (key_padding_mask, (n - 1,))
        given["attn_mask"] = (attn_mask, (2, 3))
        for name, (t, axes) in given.items():
            if t is not None and t.dim() not in axes:
                expected = " or ".join(f"{a}-D" for a in axes)
                raise AssertionError(
                    f"For {n}-D query, expected {name} to be {expected}, got {t.dim()}-D"
                )
        if n == 2 and attn_mask is not None and attn_mask.dim() == 3:
            expected = (self.num_heads, query.shape[0], key.shape[0])
            if attn_mask.shape != expected:
                got = tuple(attn_mask.shape)
                raise AssertionError(f"Expected attn_mask shape to be {expected} but got {got}")
        return n == 3

    def _check(self, query, key, value, rows):
        E = self.embed_dim
        if query.shape[2] != E:
            got = query.shape[2]
            raise AssertionError(f"was expecting embedding dimension of {E}, but got {got}")
        axes = 3 if self._qkv_same_embed_dim else 2
        if key.shape[:axes] != value.shape[:axes]:
            got = f"{tuple(key.shape)} and {tuple(value.shape)}"
            raise AssertionError(f"key and value must agree in {axes} axes, got {got}")
        if key.shape[1 - rows] != query.shape[1 - rows]:
            got = f"{key.shape[1 - rows]}, expected {query.shape[1 - rows]}"
            raise RuntimeError(f"key must have the batch size of query, got {got}")

    def _heads(self, query, key, value, alike, rows):
        """q, k, v as (N, heads, L or S, head_dim), views as far as possible; added: extra keys."""
        q, k, v = self._project(query, key, value, alike)
        if self.bias_k is not None:
            size = (*k.shape[:rows], 1, *k.shape[rows + 1 :])
            k, v = (
                torch.cat([t, b.view(self.num_heads, self.head_dim).expand(size)], dim=rows)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            behind = (0, 0, 0, 0, 0, 1) if rows else (0, 0, 0, 0, 0, 0, 0, 1)
            k, v = F.pad(k, behind), F.pad(v, behind)
        order = (0, 2, 1, 3) if rows else (1, 2, 0, 3)
        added = (self.bias_k is not None) + self.add_zero_attn
        return *(t.permute(order) for t in (q, k, v)), added

    def _project(self, query, key, value, alike):
        """The projections (·, ·, heads, head_dim); the last `alike` inputs, one tensor, at once."""
        heads, E = (self.num_heads, self.head_dim), self.embed_dim
        inputs, sizes = (query, key, value)[: 4 - alike], [1] * (3 - alike) + [alike]
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.split([n * E for n in sizes])
        else:
            inputs, sizes = (query, key, value), [1, 1, 1]
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        bias = self.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.split([n * E for n in sizes])
        found = []
        for x, w, b, n in zip(inputs, weights, biases, sizes, strict=False):
            found += F.linear(x, w, b).unflatten(2, (n, *heads)).unbind(2)
        return found

    def _masks(self, attn_mask, key_padding_mask, q, S, added):
        """mask (True = attend) and bias, each None or to be broadcast to (N, heads, L, S)."""
        N, _, L, _ = q.shape
        given = {}
        if attn_mask is not None:
            given["attn_mask"] = self._attn_mask(attn_mask, N, L, S, added)
        if key_padding_mask is not None:
            if key_padding_mask.shape != (N, S):
                got = f"{tuple(key_padding_mask.shape)}, expected {(N, S)}"
                raise AssertionError(f"key_padding_mask must be (N, S), got {got}")
            given["key_padding_mask"] = F.pad(key_padding_mask, (0, added))[:, None, None]
        masks = [m for m in given.values() if m.dtype == torch.bool]
        biases = [m for m in given.values() if m.is_floating_point()]
        if len(masks) + len(biases) < len(given):
            raise AssertionError(f"only bool and floating types of {' and '.join(given)} supported")
        if len(masks) == 2:  # the padding as a bias has N S elements, the two in one mask N L S
            biases.append(q.new_zeros(()).masked_fill(masks.pop(), -torch.inf))
        bias = biases[0] + biases[1] if len(biases) == 2 else biases[0] if biases else None
        return ~masks[0] if masks else None, bias

    def _attn_mask(self, attn_mask, N, L, S, added):
        expected = (L, S) if attn_mask.dim() == 2 else (N * self.num_heads, L, S)
        if attn_mask.shape != expected:
            axes, got = attn_mask.dim(), tuple(attn_mask.shape)
            raise RuntimeError(
                f"The shape of the {axes}D attn_mask is {got}, but should be {expected}."
            )
        attn_mask = F.pad(attn_mask, (0, added)) if added else attn_mask
        return attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (N, self.num_heads))


def _attend_with_weights(q, k, v, mask, bias, dropout_p):
    """o and the weights (N, heads, L, S), by torch's operators; rows without a key are 0."""
    s = (q * q.shape[3] ** -0.5) @ k.mT
    if bias is not None:
        s = s + bias
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    if mask is None and bias is None:
        p = s.softmax(dim=-1)
    else:
        empty = (s == -torch.inf).all(dim=-1, keepdim=True)
        p = s.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    p = F.dropout(p, dropout_p) if dropout_p else p
    return p @ v, p
