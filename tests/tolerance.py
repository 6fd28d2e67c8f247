"""The one tolerance rule of every family's tests; no other tolerance is set by hand.

float32, bfloat16, float16    err(ours, ref) <= k * err(peer, ref) + 4 * eps * max|ref|
float64                       err(ours, ref) <= 1e-12 * max|ref|

err is the largest absolute difference, ref the float64 reference of the same inputs, peer what
torch gives in the dtype of ours; k = 2, and 3 for gradients. Shapes agree; NaN, inf and -inf stand
in the same places. Arrays may be NumPy's or torch's.
"""

import numpy as np

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def assert_close(ours, ref64, peer=None, *, grad=False, name="result"):
    """Hold one array against the rule; peer may be left out for float64."""
    dtype, ours = _dtype(ours), _float64(ours)
    assert _dtype(ref64) == "float64", f"{name}: the reference is {_dtype(ref64)}, not float64"
    ref = _float64(ref64)
    assert ours.shape == ref.shape, f"{name}: shape {ours.shape}, expected {ref.shape}"
    for what, where in (("NaN", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        misplaced = np.argwhere(where(ours) != where(ref))
        assert not len(misplaced), f"{name}: {what} misplaced, first at {misplaced[0].tolist()}"
    scale = _largest(ref)
    if dtype == "float64":
        bound = 1e-12 * scale
    else:
        assert peer is not None, f"{name}: {dtype} is judged beside torch's result: give peer"
        assert _dtype(peer) == dtype, f"{name}: {dtype}, but the peer is {_dtype(peer)}"
        peer = _float64(peer)
        assert peer.shape == ref.shape, f"{name}: peer's shape {peer.shape}, expected {ref.shape}"
        bound = (3 if grad else 2) * _largest(_difference(peer, ref)) + 4 * EPS[dtype] * scale
    difference = _difference(ours, ref)
    err = _largest(difference)
    if err > bound:
        at = np.unravel_index(np.argmax(np.abs(difference)), ref.shape)
        raise AssertionError(
            f"{name} {dtype}{list(ref.shape)}: error {err:.3g} > {bound:.3g} allowed, "
            f"{err / scale if scale else np.inf:.3g} of max|ref| {scale:.3g}; "
            f"at {[int(i) for i in at]} {ours[at]!r}, expected {ref[at]!r}"
        )


def assert_all_close(ours, ref64, peer=None, *, grad=False):
    """Hold {name: array} against the rule: the same names, each array close."""
    assert set(ours) == set(ref64), f"names {sorted(ours)}, expected {sorted(ref64)}"
    for name, ref in ref64.items():
        label = f"d{name}" if grad else name
        assert_close(ours[name], ref, peer and peer[name], grad=grad, name=label)


def _dtype(a):
    return str(a.dtype).removeprefix("torch.")


def _float64(a):
    return a.detach().double().numpy() if hasattr(a, "detach") else np.asarray(a, np.float64)


def _difference(a, ref):
    """a - ref where both are finite, else 0."""
    finite = np.isfinite(a) & np.isfinite(ref)
    return np.subtract(a, ref, out=np.zeros_like(ref), where=finite)


def _largest(a):
    return float(np.max(np.abs(a), initial=0, where=np.isfinite(a)))
