"""Real phrases letter by letter, for tasks that spell.

Signs are the 26 letters and a space, START and END around them, and PAD.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

PAD, START, END = 0, 1, 2
LETTERS = " abcdefghijklmnopqrstuvwxyz"
SIGNS = len(LETTERS) + END + 1
NUMBER = {letter: i for i, letter in enumerate(LETTERS, END + 1)}


def spelled(texts: Iterable[str]) -> Tensor:
    """Texts (B) to signs (T + 2, B): START, the letters, END, PAD."""
    rows = [[START, *(NUMBER[letter] for letter in text), END] for text in texts]
    signs = torch.full((max(map(len, rows)), len(rows)), PAD)
    for b, row in enumerate(rows):
        signs[: len(row), b] = torch.tensor(row)
    return signs


def phrase(words: list[str], letters: int, rng: np.random.Generator) -> str:
    """From a random word of a sentence on, as many as fit; the first is cut if it does not."""
    start = int(rng.integers(0, len(words)))
    text = words[start][:letters]
    for word in words[start + 1 :]:
        if len(text) + 1 + len(word) > letters:
            break
        text += f" {word}"
    return text


@torch.no_grad()
def greedy(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], h: Tensor, T: int) -> Tensor:
    """T signs (T, B), each the likeliest after those before it, from state h (layers, B, H).

    `step` takes the sign before (1, B) and the state, to logits (1, B, SIGNS) and the next state.
    """
    given, written = torch.full((1, h.shape[1]), START), []
    for _ in range(T):
        logits, h = step(given, h)
        given = logits.argmax(2)
        written.append(given)
    return torch.cat(written)
