"""The bars of the family "attention": ratios against peers, shares of what the machine can do."""

from collections.abc import Callable

from .bars import Bar
from .runner import Row

RUNTIMES = ("onnxruntime", "openvino")


def _sdpa(*jobs: str, option: str = "", **shape) -> Callable[[dict], bool]:
    wanted = {"op": "sdpa", "option": option, **shape}

    def select(case: dict) -> bool:
        return case["job"] in jobs and all(case[key] == value for key, value in wanted.items())

    return select


def _causal(job: str) -> Callable[[dict], bool]:
    square = _sdpa(job, causal=True)
    return lambda case: square(case) and case["L"] <= 2048


def _padded(case: dict) -> bool:
    return case["option"] in ("mask", "lengths")


def _forward(case: dict) -> bool:
    return case["op"] == "sdpa" and case["job"] != "train"


def _long(case: dict) -> bool:
    return _sdpa("fwd")(case) and case["L"] >= 2048 and case["D"] in (64, 128)


def _shared_keys(case: dict) -> bool:
    return _sdpa("decode")(case) and case["NH"] == 4 * case["NK"] and case["S"] >= 4096


def _own_keys(case: dict) -> bool:
    return _sdpa("decode")(case) and case["NH"] == case["NK"]


def _one_key_head(case: dict) -> bool:
    return _sdpa("decode")(case) and case["NK"] == 1


def _bound_by_reading(case: dict) -> bool:
    return _sdpa("decode")(case) and not _one_key_head(case)  # its many rows are bound by products


def _torch(row: Row) -> float | None:
    return row.ratio("torch")


def _best_runtime(row: Row) -> float | None:
    return min((ratio for peer in RUNTIMES if (ratio := row.ratio(peer))), default=None)


def _percent_of_product(row: Row) -> float | None:
    share = row.product_share()
    return None if share is None else 100 * share


def _percent_of_read(row: Row) -> float | None:
    share = row.read_share()
    return None if share is None else 100 * share


BARS = (
    Bar("forward / torch", _sdpa("fwd", causal=False), _torch, 1.1, 1.25),
    Bar("causal forward, L <= 2048 / torch", _causal("fwd"), _torch, 1.2, 1.7),
    Bar("training / torch", _sdpa("train", causal=False), _torch, 1.0, 1.25),
    Bar("causal training, L <= 2048 / torch", _causal("train"), _torch, 1.15, 1.6),
    Bar("keys padded to 52 % / torch with a mask", _padded, _torch, 1.5, 1.8),
    Bar(
        "window 256 at L 2048 / torch with a mask",
        _sdpa("fwd", "train", option="window"),
        _torch,
        5.0,
        5.0,
    ),
    Bar("training with dropout / torch", _sdpa("train", option="dropout"), _torch, 4.0, 5.0),
    Bar("training with a learned bias / torch", _sdpa("train", option="bias"), _torch, 2.0, 3.0),
    Bar("decode, NK = NH / 4, S 4k to 64k / torch", _shared_keys, _torch, 2.3, 3.3),
    Bar("decode, NK = NH / torch", _own_keys, _torch, 1.0, 1.15),
    Bar("decode, one key head / torch", _one_key_head, _torch, 1.0),
    Bar("forward / best of ONNX Runtime and OpenVINO", _forward, _best_runtime, 1.0),
    Bar(
        "forward, L >= 2048, D 64 and 128, share of the product ceiling",
        _long,
        _percent_of_product,
        worst=82,
        unit="%",
    ),
    Bar(
        "decode, share of the read ceiling", _bound_by_reading, _percent_of_read, worst=80, unit="%"
    ),
)
