"""The gradients of a reference against its own forward pass, along random directions."""

import numpy as np

EPS = np.finfo(np.longdouble).eps


def directional_derivative(function, at, direction):
    """Five-point stencil in long double: error O(eps^(4/5)) at the step eps^(1/5)."""
    step = EPS ** (1 / 5)
    f = [function(at + k * step * direction) for k in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)


def assert_gradients_are_those_of(loss, inputs, grads, rng):
    """loss(**inputs) with one of the long double inputs moved at a time; grads in their names."""
    assert set(grads) == set(inputs)
    # 100: the constants of the two error terms; measured within 5
    bound = 100 * EPS ** (4 / 5) * max(1, abs(loss(**inputs)))
    for name, a in inputs.items():
        direction = rng.standard_normal(a.shape).astype("longdouble")
        direction /= np.sqrt((direction**2).sum())
        slope = directional_derivative(
            lambda moved, name=name: loss(**inputs | {name: moved}), a, direction
        )
        expected = (grads[name] * direction).sum()
        assert abs(slope - expected) <= bound, name
