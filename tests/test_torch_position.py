"""fastseq.torch's positional encodings: values, rotary's gradient and operator, tables, errors."""

import numpy as np
import pytest
from tolerance import assert_close

import fastseq
from fastseq.reference import position as reference

torch = pytest.importorskip("torch")

import fastseq.torch as ft  # noqa: E402

TURNS = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "partial": {"dim": 4, "base": 100.0},
    "none": {"dim": 0},
    "offset": {"offsets": 5},
    "offsets": {"offsets": (3, 0)},
    "inverse": {"inverse": True, "interleaved": True, "offsets": (1, 7)},
}
every_turn = pytest.mark.parametrize("options", TURNS.values(), ids=TURNS)


def as_tensors(options):
    options = dict(options)
    if isinstance(options.get("offsets"), tuple):
        options["offsets"] = torch.tensor(options["offsets"])
    return options


def as_arrays(options):
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def draw(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)


def rotated_by_torch(x, dy, dim=None, base=10000.0, interleaved=False, offsets=0, inverse=False):
    """y and dx by torch's operators in x's dtype, angles in float64."""
    x = x.detach().clone().requires_grad_()
    dim = x.shape[-1] if dim is None else dim
    start = torch.as_tensor(offsets).view(-1, 1, 1, 1)
    positions = start + torch.arange(x.shape[-2]).view(-1, 1)
    theta = positions / base ** (torch.arange(0, dim, 2).double() / dim)
    theta = -theta if inverse else theta
    cos, sin = theta.cos().to(x.dtype), theta.sin().to(x.dtype)
    x1, x2 = (x[..., i:dim:2] for i in (0, 1)) if interleaved else x[..., :dim].chunk(2, -1)
    parts = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    y = torch.cat((turned, x[..., dim:]), -1)
    return y, torch.autograd.grad(y, x, dy)[0]


@every_turn
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rotary_and_its_gradient_meet_the_reference(dtype, options):
    options = as_tensors(options)
    x, dy = draw(2, 3, 5, 6, dtype=dtype), torch.randn(2, 3, 5, 6, dtype=dtype)
    y = ft.rotary(x, **options)
    (dx,) = torch.autograd.grad(y, x, dy)
    peer_y, peer_dx = rotated_by_torch(x, dy, **options)
    wide, turn = (t.detach().double().numpy() for t in (x, dy)), as_arrays(options)
    wide_x, wide_dy = wide
    assert_close(y, reference.rotary(wide_x, **turn), peer_y)
    assert_close(dx, reference.rotary_vjp(wide_x, dy=wide_dy, **turn)["x"], peer_dx, grad=True)


@every_turn
def test_rotary_gradcheck_of_both_orders(options):
    options = as_tensors(options)

    def function(x):
        return ft.rotary(x, **options)

    x = draw(2, 1, 3, 6)
    assert torch.autograd.gradcheck(function, x, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(function, x, nondet_tol=0.0)


@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 6), (2, 3, 5, 6), (2, 3, 0, 6)], ids=str)
def test_rotary_is_the_numpy_functions(shape):
    x = draw(*shape)
    laid_out = x.detach().transpose(0, 1).contiguous().transpose(0, 1) if len(shape) > 2 else x
    for given in (x, laid_out):
        expected = fastseq.rotary(given.detach().numpy(), offsets=2)
        for y in (ft.rotary(given, offsets=2), ft.rotary(given.detach(), offsets=2)):
            assert np.array_equal(y.detach().numpy(), expected)
            assert y.detach().numpy().strides == expected.strides


@every_turn
def test_rotary_opcheck(options):
    x = draw(2, 3, 5, 6)
    offsets = as_tensors(options).get("offsets", 0)
    starts, first = (offsets, 0) if isinstance(offsets, torch.Tensor) else (None, offsets)
    numbers = (options.get("interleaved", False), first, options.get("inverse", False))
    args = (starts, options.get("dim"), options.get("base", 10000.0), *numbers)
    torch.library.opcheck(torch.ops.fastseq.rotary.default, (x, *args))
    strided = draw(2, 5, 3, 6).transpose(1, 2)
    tests = "test_faketensor"
    torch.library.opcheck(torch.ops.fastseq.rotary.default, (strided, *args), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()

    def function(x, start):
        x = x + ft.sinusoidal_positions(x.shape[-2], 6, dtype=torch.float64)
        slopes = ft.alibi_slopes(3, dtype=torch.float64).view(3, 1, 1)
        return ft.rotary(x, offsets=start) + slopes * ft.rotary(x, offsets=2, inverse=True)

    x, start = draw(2, 3, 5, 6), torch.tensor([4, 0])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = [f(x, start) for f in (function, compiled)]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in results]
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tables_are_the_numpy_functions(dtype):
    tensor_dtype = getattr(torch, dtype)
    for NH in (1, 2, 3, 8, 12, 96):
        ours, expected = ft.alibi_slopes(NH, tensor_dtype), fastseq.alibi_slopes(NH, dtype)
        assert np.array_equal(ours.numpy(), expected)
    for L, D in ((7, 6), (7, 5), (3, 1), (0, 4), (4, 0)):
        ours = ft.sinusoidal_positions(L, D, 100.0, tensor_dtype)
        expected = reference.sinusoidal_positions(L, D, 100.0)
        assert ours.dtype == tensor_dtype and ours.is_contiguous()
        if dtype == "float64":
            assert_close(ours, expected)
        else:  # rounded once
            assert_close(ours, expected, torch.from_numpy(expected).float())


WRONG = {
    "numpy": (TypeError, "x must be a torch.Tensor, got ndarray", np.zeros((2, 2)), {}),
    "half": (TypeError, "x must be float32 or float64 on the CPU", torch.zeros(2, 2).half(), {}),
    "rank": (ValueError, "x must be", torch.zeros(2), {}),
    "odd": (ValueError, "dim must be even", torch.zeros(2, 3), {}),
    "dim": (ValueError, r"in 0\.\.D = 0\.\.4", torch.zeros(2, 4), {"dim": 6}),
    "offsets-float": (TypeError, "offsets must be integers", torch.zeros(2, 4), {"offsets": 1.5}),
    "offsets-negative": (ValueError, "offsets must be >= 0", torch.zeros(2, 4), {"offsets": -1}),
    "offsets-shape": (
        ValueError,
        r"offsets must be \(B,\) = \(1,\)",
        torch.zeros(1, 1, 2, 4),
        {"offsets": torch.tensor([1, 2])},
    ),
}


@pytest.mark.parametrize("error, match, x, options", WRONG.values(), ids=WRONG)
def test_rotary_errors(error, match, x, options):
    with pytest.raises(error, match=match):
        ft.rotary(x, **options)


def test_table_errors():
    with pytest.raises(ValueError, match="L and D must be >= 0, got L = -1, D = 2"):
        ft.sinusoidal_positions(-1, 2)
    with pytest.raises(ValueError, match="NH must be >= 1, got 0"):
        ft.alibi_slopes(0)
