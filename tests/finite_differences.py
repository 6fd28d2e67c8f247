"""Gradients against the forward pass that they belong to, along random directions.

A reference is held in long double, a kernel in float64.
"""

import numpy as np


def directional_derivative(function, at, direction):
    """Five-point stencil: error O(eps^(4/5)) at the step eps^(1/5)."""
    step = np.finfo(at.dtype).eps ** (1 / 5)
    f = [function(at + k * step * direction) for k in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)


def assert_gradients_are_those_of(loss, inputs, grads, rng):
    """loss(**inputs) with one input, all of one dtype, moved at a time; grads in their names."""
    assert set(grads) == set(inputs)
    # 100: the constants of the two error terms; measured within 5
    eps = np.finfo(next(iter(inputs.values())).dtype).eps
    bound = 100 * eps ** (4 / 5) * max(1, abs(loss(**inputs)))
    for name, a in inputs.items():
        direction = rng.standard_normal(a.shape).astype(a.dtype)
        direction /= np.sqrt((direction**2).sum())
        slope = directional_derivative(
            lambda moved, name=name: loss(**inputs | {name: moved}), a, direction
        )
        expected = (grads[name] * direction).sum()
        assert abs(slope - expected) <= bound, name
