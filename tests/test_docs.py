"""Every public function says what it takes: the Args section names the signature's arguments."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import fastseq

SECTIONS = ["Args", "Returns", "Raises", "Accuracy", "Cost", "Equivalent to", "Source"]
COMPUTE = ["rnn", "gru", "lstm", "rnn_cell", "gru_cell", "lstm_cell"]
COMPUTE += ["linear_scan", "min_gru", "min_lstm", "cell", "scan"]
COMPUTE += ["attention", "attention_varlen", "merge_attention"]
COMPUTE += ["rotary", "sinusoidal_positions", "alibi_slopes", "vjp"]
SCALARS = {"nonlinearity", "reverse", "return_cell_states", "clip_recurrent_grad"}
SCALARS |= {"function", "split", "recurrent", "cell"}
SCALARS |= {"causal", "window", "scale", "softcap", "score_mod", "dropout_p", "seed", "return_lse"}
SCALARS |= {"L", "D", "NH", "base", "dtype", "dim", "interleaved", "offsets", "inverse"}
TRAINING = ["clip_grad_norm_", "clip_grad_value_", "tbptt", "gradient_flow", "plot_gradient_flow"]
MODULES = ["fastseq", "fastseq.torch", "fastseq.init", "fastseq.torch.init"]


def public(module):
    """The public functions and classes of a module, [] where an optional part is absent."""
    try:
        module = importlib.import_module(module)
    except ModuleNotFoundError:
        return []
    names = getattr(module, "__all__", [])
    return [getattr(module, n) for n in names if callable(getattr(module, n))]


FUNCTIONS = [
    pytest.param(fn, id=f"{module}.{fn.__name__}") for module in MODULES for fn in public(module)
]


def section(doc, title):
    """The lines below `title:`, or None; sections end where the indentation does."""
    found = re.search(rf"^{title}:(.*(?:\n(?: .*)?)*)", doc, re.M)
    return found and found[1]


def documented(doc):
    """The names of the Args section; a line may name several, `b_ih, b_hh: (4H,)`."""
    entries = re.findall(r"^    (\w[\w, *]*):", section(doc, "Args") or "", re.M)
    return [name.strip(" *") for entry in entries for name in entry.split(",")]


def test_the_public_names_are_those_of_the_design():
    names = {*COMPUTE, *TRAINING, "set_num_threads", "get_num_threads", "show_config"}
    assert names <= set(fastseq.__all__)
    assert {fn.values[0].__name__ for fn in FUNCTIONS} >= names


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_args_are_the_signatures(fn):
    doc = inspect.getdoc(fn)
    assert doc and len(doc.splitlines()[0]) > 10
    assert documented(doc) == list(inspect.signature(fn).parameters)


@pytest.mark.parametrize(
    "fn", [getattr(fastseq, n) for n in COMPUTE + TRAINING] + public("fastseq.init")
)
def test_what_computes_has_every_section(fn):
    """In one order, none empty, after an equation."""
    doc = inspect.getdoc(fn)
    found = re.findall(r"^([A-Z][\w ]*):", doc, re.M)
    assert [title for title in found if title in SECTIONS] == SECTIONS
    for title in SECTIONS:
        assert section(doc, title).strip(), title
    assert "=" in doc.split("Args:")[0]


@pytest.mark.parametrize("name", COMPUTE[:-1])
def test_shapes_are_stated(name):
    """Every array's line begins with its shape."""
    doc = inspect.getdoc(getattr(fastseq, name))
    for line in section(doc, "Args").splitlines():
        entry = re.match(r"    (\w+): (.*)", line)
        if entry and entry[1] not in SCALARS:
            assert re.match(r"\([\w, +.]+\)", entry[2]), line


def test_the_readme_runs():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    names: dict = {}
    for block in blocks:
        if "import torch" in block:
            pytest.importorskip("torch")
        exec(block, names)
    assert names["dw_hh"].any() and names["y"].requires_grad
