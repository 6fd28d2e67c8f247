"""How every task trains: fastseq and torch side by side from one seed, on the same batches.

Of `Recipe.steps` steps torch takes part in the first `shared`: there the two take turns and are
timed in pairs, and the losses must agree. Training amplifies rounding, so the yardstick is lm.py's:
a twin of torch's model with every initial weight one rounding off; ours may differ from torch by
DRIFT times what torch differs from that twin. A twin that happens to agree counts as one rounding
of the loss, a float32.
"""

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from .. import lm, measure
from ..bars import Verdict
from ..families import OURS
from .library import OWN, TORCH, Library

COLUMNS = ("fastseq step", "torch step", "ratio", "max |loss - torch|")
KEPT = 100  # points of a curve that the JSON keeps: means of equal stretches

Batch = tuple[Tensor, ...]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: by Adam or "SGD", gradients clipped; `shared` steps by torch too."""

    steps: int
    shared: int
    learning_rate: float = 3e-3
    clip_norm: float = math.inf
    seed: int = 0
    optimizer: str = "Adam"  # of torch.optim


class Trainer:
    """A model in training, its losses, and the gradient norms before clipping."""

    def __init__(self, build: Callable[[Library], nn.Module], library: Library, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.model = build(library)
        self.library, self.recipe = library, recipe
        optimizer = getattr(torch.optim, recipe.optimizer)
        self.optimizer = optimizer(self.model.parameters(), recipe.learning_rate)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, loss_of: Callable[..., Tensor], batch: Batch) -> float:
        """Forward, backward, clip, update. Returns its seconds."""
        start = time.perf_counter()
        loss = loss_of(self.model, *batch)
        self.optimizer.zero_grad()
        loss.backward()
        norm = self.library.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.norms.append(norm.item())
        return time.perf_counter() - start


@dataclass(frozen=True)
class Trained:
    """What training leaves: the trainers by contender, the twin's too, seconds per shared step."""

    name: str
    trainers: dict[str, Trainer]
    times: measure.Times

    def model(self, who: str = OURS) -> nn.Module:
        """Of a contender."""
        return self.trainers[who].model

    @property
    def whole(self) -> bool:
        """Whether torch trained to the end."""
        return len(self.trainers["torch"].losses) == len(self.trainers[OURS].losses)

    def drift(self, who: str) -> float:
        """The largest difference from torch's loss curve, until neither is finite any more."""
        pairs = zip(self.trainers[who].losses, self.trainers["torch"].losses, strict=False)
        known = takewhile(lambda pair: any(map(math.isfinite, pair)), pairs)
        return max((_distance(*pair) for pair in known), default=0.0)

    @property
    def rounding(self) -> float:
        """Torch's own: what its twin differs by, and at least one rounding of a float32 loss."""
        largest = max(filter(math.isfinite, self.trainers["torch"].losses))
        return max(self.drift(lm.TWIN), torch.finfo(torch.float32).eps * largest)

    def cells(self) -> tuple[str, ...]:
        """Under COLUMNS."""
        steps = (f"{1e3 * measure.median(self.times[who]):.2f} ms" for who in (OURS, "torch"))
        ratio = measure.median(measure.ratios(self.times, "torch", OURS))
        return (*steps, f"{ratio:.2f}", f"{self.drift(OURS):.1e}")

    def data(self) -> dict:
        """For the JSON."""
        curves = {who: thinned(trainer.losses) for who, trainer in self.trainers.items()}
        steps = {who: len(trainer.losses) for who, trainer in self.trainers.items()}
        return {"steps": steps, "losses": curves, "times": self.times}


def train(
    name: str,
    build: Callable[[Library], nn.Module],
    loss_of: Callable[..., Tensor],
    batches: Iterator[Batch],
    recipe: Recipe,
    progress: Progress,
) -> Trained:
    """`build` makes the model of a library; `loss_of(model, *batch)` is what is minimised."""
    trainers = {OURS: Trainer(build, OWN, recipe), "torch": Trainer(build, TORCH, recipe)}
    trainers[lm.TWIN] = Trainer(build, TORCH, recipe)
    lm.move_by_one_rounding(trainers[lm.TWIN].model, recipe.seed)
    times: measure.Times = {who: [] for who in trainers}
    for step, batch in enumerate(islice(batches, recipe.steps)):
        if step < recipe.shared:
            for who in trainers if step % 2 == 0 else reversed(list(trainers)):
                time.sleep(measure.REST_S)
                times[who].append(trainers[who].step(loss_of, batch))
        else:
            trainers[OURS].step(loss_of, batch)
        progress((step + 1) / recipe.steps)
    return Trained(name, trainers, times)


def part(progress: Progress, done: int, total: int) -> Progress:
    """The progress of one of `total` parts, `done` of them behind it."""
    return lambda share: progress((done + share) / total)


def thinned(curve: list[float]) -> list[float | None]:
    """At most KEPT means of equal stretches; None, as JSON has it, where one is not finite."""
    length = math.ceil(len(curve) / KEPT)
    stretches = (curve[i : i + length] for i in range(0, len(curve), length or 1))
    means = (sum(stretch) / len(stretch) for stretch in stretches)
    return [float(f"{mean:.6g}") if math.isfinite(mean) else None for mean in means]


def _distance(a: float, b: float) -> float:
    return abs(a - b) if math.isfinite(a - b) else math.inf


def same_curve(task: str, found: Iterable[Trained]) -> Verdict:
    """Whether all of a task's models lose what torch's lose, within rounding."""
    found = list(found)
    excess = {t.name: t.drift(OURS) / t.rounding for t in found}
    worst = max(excess, key=lambda name: excess[name])
    return Verdict(
        f"{task}: the loss curves of torch within rounding",
        f"<= {lm.DRIFT:g} x torch's own rounding",
        f"worst {excess[worst]:.2g} x, {worst}",
        f"{len(found)} models, {min(len(t.times[OURS]) for t in found)} steps",
        excess[worst] <= lm.DRIFT,
    )


def verdict(text: str, bar: str, measured: str, passed: bool, judged: bool = True) -> Verdict:
    """On an outcome; not judged where the quick profile trains too little for it."""
    rows = "full" if judged else "quick: too few steps"
    return Verdict(text, bar, measured, rows, passed if judged else None)


def about(config: Any, found: Iterable[Trained], **more) -> dict:
    """A task's data for the JSON; `config` is the task's, or the recipe alone."""
    kept = {"config": asdict(config), "python": platform.python_version()}
    return kept | {"models": {t.name: t.data() for t in found}} | more
