"""The correctness gate: a contender whose result is wrong gets an error, never a time.

The right-hand side is float64 (torch.nn in float64 on the same weights). Ours is held to the
library's one tolerance; a peer only has to compute the same function, since its accuracy is its
own choice: a mixed-up gate order or a missing bias is off by 10 % and more.
"""

from collections.abc import Mapping

import numpy as np

Results = Mapping[str, np.ndarray]  # name of an output or a gradient -> values

PEER_TOLERANCE = 1e-3  # of max|ref|
FORWARD_SLACK, GRADIENT_SLACK = 2, 3


class WrongResult(Exception):
    """A contender's result is outside its tolerance; the message says where and how far."""


def max_error(got: np.ndarray, ref: np.ndarray) -> float:
    """max|got - ref|; infinite where a NaN or a wrong shape is found."""
    if got.shape != ref.shape:
        return np.inf
    if got.size == 0:
        return 0.0
    error = float(np.max(np.abs(got.astype(np.float64) - ref)))
    return np.inf if np.isnan(error) else error


def relative_error(got: Results, ref: Results) -> float:
    """The largest error over all results, each in units of its own max|ref|."""
    return max(max_error(got[key], ref[key]) / _scale(ref[key]) for key in ref)


def check_ours(got: Results, same_dtype: Results, ref: Results) -> None:
    """err(ours) <= slack * err(torch in the same dtype) + 4 * eps * max|ref|, or WrongResult."""
    for key in ref:
        slack = GRADIENT_SLACK if key.startswith("d") else FORWARD_SLACK
        eps = float(np.finfo(same_dtype[key].dtype).eps)
        limit = slack * max_error(same_dtype[key], ref[key]) + 4 * eps * _scale(ref[key])
        _require(key, got[key], ref[key], limit)


def check_peer(got: Results, ref: Results) -> None:
    """err(peer) <= PEER_TOLERANCE * max|ref|, or WrongResult."""
    for key in ref:
        _require(key, got[key], ref[key], PEER_TOLERANCE * _scale(ref[key]))


def _require(key: str, got: np.ndarray, ref: np.ndarray, limit: float) -> None:
    if got.shape != ref.shape:
        raise WrongResult(f"{key} has shape {got.shape}, expected {ref.shape}")
    error = max_error(got, ref)
    if not error <= limit:
        raise WrongResult(f"{key} is off by {error:.2e}, allowed {limit:.2e}")


def _scale(ref: np.ndarray) -> float:
    return float(np.max(np.abs(ref), initial=0.0)) or 1.0
