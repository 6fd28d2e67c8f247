"""Rotary's Triton kernel, through the public function: in the interpreter, or on a GPU."""

import numpy as np
import pytest
from running import assert_refused
from tolerance import assert_close

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="the GPU kernels need triton")

from fastseq.kernels.triton.launch import interpreted  # noqa: E402

import fastseq.torch as fst  # noqa: E402
from fastseq.reference import position as reference  # noqa: E402
from fastseq.torch import position  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="no GPU, and triton does not interpret"
)
DTYPES = ["float32", "float16"] + ["bfloat16"] * (DEVICE == "cuda")
TURNS = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "part": {"dim": 6},
    "part-interleaved": {"dim": 2, "interleaved": True, "base": 500.0},
    "none": {"dim": 0},
    "offset": {"offsets": 11},
    "offsets": {"offsets": (3, 100_000)},
    "inverse": {"inverse": True, "interleaved": True, "offsets": (1, 7)},
}
SIZES = [(2, 3, 19, 10), (2, 5, 3, 66), (2, 1, 1, 8)]
every_turn = pytest.mark.parametrize("options", TURNS.values(), ids=TURNS)


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setattr(position, "on_gpu", lambda tensor: True)
    with np.errstate(all="ignore"):
        yield


def as_given(options):
    """The options with offsets as a tensor on the device, where there are several."""
    offsets = options.get("offsets")
    if isinstance(offsets, tuple):
        return options | {"offsets": torch.tensor(offsets, device=DEVICE)}
    return options


def peer(x, dim=None, base=10000.0, interleaved=False, offsets=0, inverse=False):
    """torch in the dtype of x, as models write it: the angles in float64, all else in x's."""
    dim = x.shape[-1] if dim is None else dim
    positions = torch.as_tensor(offsets).view(-1, 1, 1, 1) + torch.arange(x.shape[-2]).view(-1, 1)
    theta = positions / base ** (torch.arange(0, dim, 2).double() / max(dim, 1))
    cos, sin = theta.cos().to(x.dtype), theta.sin().to(x.dtype) * (-1 if inverse else 1)
    x1, x2 = (x[..., i:dim:2] for i in (0, 1)) if interleaved else x[..., :dim].chunk(2, -1)
    parts = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((turned, x[..., dim:]), -1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@every_turn
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_and_its_gradient_meet_the_reference(dtype, options, size, rng):
    x, dy = (torch.tensor(rng.standard_normal(size)).to(getattr(torch, dtype)) for _ in "xy")
    leaf = x.to(DEVICE, copy=True).requires_grad_()
    y = fst.rotary(leaf, **as_given(options))
    (dx,) = torch.autograd.grad(y, leaf, dy.to(DEVICE))
    back = options | {"inverse": not options.get("inverse", False)}
    wide = [a.double().numpy() for a in (x, dy)]
    assert_close(y.cpu(), reference.rotary(wide[0], **options), peer(x, **options), name="y")
    ref = reference.rotary_vjp(wide[0], dy=wide[1], **options)["x"]
    assert_close(dx.cpu(), ref, peer(dy, **back), grad=True, name="dx")


def test_fewer_axes_and_layouts():
    x = torch.randn(2, 3, 19, 8, device=DEVICE)
    y = fst.rotary(x, offsets=4)
    assert torch.equal(fst.rotary(x[1], offsets=4), y[1])
    assert torch.equal(fst.rotary(x[1, 2], offsets=4), y[1, 2])
    strided = fst.rotary(x.transpose(1, 2).contiguous().transpose(1, 2), offsets=4)
    assert torch.equal(strided, y)
    assert strided.transpose(1, 2).is_contiguous()
    assert torch.equal(fst.rotary(x.mT.contiguous().mT, offsets=4), y)
    assert fst.rotary(x[:, :, :0]).shape == (2, 3, 0, 8)


def test_errors_name_the_argument():
    x = torch.zeros(2, 3, 4, 6, device=DEVICE)
    assert_refused(
        lambda: fst.rotary(x.double()), TypeError,
        "rotary: x must be float32, bfloat16 or float16 on a CUDA device, "
        f"got float64 on {x.device}",
    )  # fmt: skip
    assert_refused(
        lambda: fst.rotary(x, dim=3), ValueError,
        "rotary: dim must be even and in 0..D = 0..6, got 3",
    )  # fmt: skip
    assert_refused(
        lambda: fst.rotary(x, offsets=torch.zeros(3, dtype=torch.int64, device=DEVICE)),
        ValueError, "rotary: offsets must be (B,) = (2,), got (3,)",
    )  # fmt: skip
    assert_refused(
        lambda: fst.rotary(x, offsets=-1), ValueError, "rotary: offsets must be >= 0, got -1"
    )


def test_operator_is_registered_for_cuda_and_equals_the_direct_path():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastseq::rotary", "CUDA")
    x = torch.randn(2, 3, 19, 8, device=DEVICE)
    by_operator = torch.ops.fastseq.rotary(x, None, None, 10000.0, False, 5, False)
    assert torch.equal(by_operator, fst.rotary(x, offsets=5))
