"""Real phrases as letters: words of the standard library's docstrings, for tasks that spell.

Signs are the 26 letters and a space, and around them PAD, START and END.
"""

from collections.abc import Iterable

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
    """As many words of a sentence as fit `letters`, from a random one on; at least one."""
    start = int(rng.integers(0, len(words)))
    text = words[start][:letters]
    for word in words[start + 1 :]:
        if len(text) + 1 + len(word) > letters:
            break
        text += f" {word}"
    return text
