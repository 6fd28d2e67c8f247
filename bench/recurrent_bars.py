"""The bars of the family "rnn": ratios against peers, shares of the ceiling, cost of a call.

Inference and training mean the layer and bidirectional cases; the streaming step has no bar.
"""

from collections.abc import Callable

from .bars import Bar
from .runner import Row

LSTM, OTHERS = ("lstm",), ("gru", "rnn_tanh", "rnn_relu")


def _job(job: str, kinds: tuple[str, ...] = LSTM + OTHERS, **shape) -> Callable[[dict], bool]:
    wanted = {"job": job, **shape}

    def select(case: dict) -> bool:
        return case["kind"] in kinds and all(case[key] == value for key, value in wanted.items())

    return select


def _against(peer: str) -> Callable[[Row], float | None]:
    return lambda row: row.ratio(peer)


def _against_best(row: Row) -> float | None:
    peer = row.best_peer()
    return None if peer is None else row.ratio(peer)


def _percent_of_product(row: Row) -> float | None:
    share = row.product_share()
    return None if share is None else 100 * share


def _percent_of_full(row: Row) -> float | None:
    ratio = row.ratio("fastseq full")
    return None if ratio is None else 100 / ratio


def _microseconds(row: Row) -> float | None:
    seconds = row.seconds()
    return None if seconds is None else 1e6 * seconds


_H1024 = {"T": 50, "B": 64, "H": 1024}
_B32_H256 = {"T": 100, "B": 32, "H": 256, "layers": 1}
_ragged, _ragged_train = _job("ragged"), _job("ragged_train")

BARS = (
    Bar("LSTM inference / torch", _job("fwd", LSTM), _against("torch"), 1.0, 1.6),
    Bar("GRU, RNN inference / torch", _job("fwd", OTHERS), _against("torch"), 1.2, 2.5),
    Bar("inference / best peer", _job("fwd"), _against_best, 0.97, 1.25),
    Bar("LSTM training / torch", _job("train", LSTM), _against("torch"), 1.05, 1.7),
    Bar("GRU, RNN training / torch", _job("train", OTHERS), _against("torch"), 1.3, 4.0),
    Bar("training at B = 1 / JAX", _job("train", B=1), _against("jax"), 0.9, 1.2),
    Bar("packed training / torch packed", _job("packed"), _against("torch"), 2.0, 5.0),
    Bar(
        "LSTM, GRU inference B64 T50 H1024, share of the product ceiling",
        _job("fwd", ("lstm", "gru"), **_H1024),
        _percent_of_product,
        worst=85,
        unit="%",
    ),
    Bar(
        "LSTM training B32 H256, share of the product ceiling",
        _job("train", LSTM, **_B32_H256),
        _percent_of_product,
        worst=75,
        unit="%",
    ),
    Bar(
        "55 % valid steps, cost against the full batch",
        lambda case: _ragged(case) or _ragged_train(case),
        _percent_of_full,
        worst=65,
        at_most=True,
        unit="%",
    ),
    Bar(
        "one call of fastseq.lstm, T1 B1 H16",
        _job("numpy_call", LSTM),
        _microseconds,
        worst=15,
        at_most=True,
        unit=" us",
    ),
    Bar(
        "one call of the LSTM module, T1 B1 H16",
        _job("call", LSTM),
        _microseconds,
        worst=30,
        at_most=True,
        unit=" us",
    ),
)
