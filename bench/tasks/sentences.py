"""Real sentences of unequal length: the docstrings of the standard library, labelled by area.

Files are read as text and parsed, nothing is imported. A docstring is for training or held out as
a whole, by its own checksum, so that no held-out sentence is a neighbour of a trained one; a
sentence that occurs twice counts once.
"""

import ast
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

AREAS = {
    "network": "email http urllib smtplib imaplib ftplib poplib socket socketserver ssl xmlrpc "
    "ipaddress asyncio wsgiref",
    "windows": "tkinter turtle idlelib",
    "testing": "unittest doctest pdb bdb logging cmd trace profile timeit warnings argparse "
    "optparse inspect pydoc traceback",
    "files": "os shutil pathlib tarfile zipfile tempfile _pyio gzip posixpath glob fileinput "
    "mimetypes filecmp bz2 lzma importlib",
    "numbers": "_pydecimal fractions statistics numbers random _pydatetime datetime calendar "
    "colorsys heapq bisect _strptime",
}
PAD, UNKNOWN = 0, 1  # word numbers
SHORTEST, LONGEST = 4, 60  # words of a sentence that is taken
RAREST = 3  # a word of the training set seen less often is UNKNOWN
HELD_OUT = 5  # one docstring in so many


@dataclass(frozen=True)
class Corpus:
    """Sentences as word numbers with the number of their area, for training and held out."""

    train: list[tuple[list[int], int]]
    held_out: list[tuple[list[int], int]]
    vocabulary: int


def load() -> Corpus:
    """From the standard library of this Python, in a fixed order."""
    parts = texts()
    counts = Counter(word for sentence in parts[False] for word in sentence.split())
    known = sorted(word for word, count in counts.items() if count >= RAREST)
    numbers = {word: i for i, word in enumerate(known, UNKNOWN + 1)}
    train, held_out = (
        [([numbers.get(word, UNKNOWN) for word in s.split()], area) for s, area in part.items()]
        for part in parts
    )
    return Corpus(train, held_out, len(numbers) + 2)


@cache
def texts() -> tuple[dict[str, int], dict[str, int]]:
    """The sentences themselves with the number of their area, for training and held out."""
    parts: tuple[dict[str, int], dict[str, int]] = {}, {}
    for area, names in enumerate(AREAS.values()):
        for path in _files(names):
            for text in _docstrings(path):
                held_out = zlib.crc32(text.encode()) % HELD_OUT == 0
                for sentence in _sentences(text):
                    if sentence not in parts[not held_out]:
                        parts[held_out].setdefault(sentence, area)
    return parts


def _files(names: str) -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in names.split():
        module = root / f"{name}.py"
        yield from [module] if module.exists() else sorted((root / name).rglob("*.py"))


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def _sentences(text: str) -> Iterator[str]:
    """Lower-case words and signs, a space between them; examples of code are left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        if ">>>" in paragraph:
            continue
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            words = re.findall(r"[a-z]+|[^\sa-z]", sentence.lower())
            if sum(word.isalpha() for word in words) >= SHORTEST and len(words) <= LONGEST:
                yield " ".join(words)
