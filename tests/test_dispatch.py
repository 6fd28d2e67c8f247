"""Which kernels run and on how many threads: what is forced is what runs, and is told truly."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import attention_running
import numpy as np
import pytest
import running
from attention_problems import ALL_OPTIONS, AttentionProblem
from fastseq.kernels.cpu import features
from problems import CELLS, Problem
from running import python
from tolerance import assert_all_close

import fastseq
from fastseq import _dispatch

LEVELS = features.supported()
BEST = [name for name in LEVELS if name != "amx"][-1]
DTYPES = ("float32", "float64")
STEMS = ("recurrent", "attention")
REGISTER_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64, "amx": 64}
HEAVY = {"torch", "numba", "triton", "jax", "onnxruntime", "openvino", "matplotlib", "rich"}
FLAGS = ({}, {"ragged": True, "resets": True, "reverse": True})
PROBLEMS = [
    Problem(cell, B=11, H=37, dtype=dtype, **flags)
    for cell in CELLS
    for dtype in DTYPES
    for flags in FLAGS
]
# Few queries in chunks of keys and several packed blocks; backward's slabs; what only packs.
PROBLEMS += [
    AttentionProblem(**{"NH": 4, "NK": 2, **options, **size}, dtype=dtype)
    for options in ({}, {"causal": "bottom_right"}, ALL_OPTIONS | {"scale": 0.2})
    for size in (
        {"L": 2, "S": 1037, "D": 37, "DV": 39},
        {"L": 53, "S": 271, "D": 37, "DV": 70},
        {"L": 13, "S": 29, "D": 3, "DV": 5},
    )
    for dtype in DTYPES
]

# Solves PROBLEMS, and prints the kernels that this has loaded as {module: lanes}.
SOLVE = """
import json, sys
import numpy as np
from test_dispatch import PROBLEMS, module_of
arrays = {}
for problem in PROBLEMS:
    for part, found in module_of(problem).solve(problem)._asdict().items():
        arrays |= {f"{problem} {part} {name}": a for name, a in found.items()}
np.savez(sys.argv[1], **arrays)
loaded = {n.split(".")[-1]: m for n, m in sys.modules.items() if m is not None and ".cpu." in n
          and n.endswith(("_f32", "_f64"))}
print(json.dumps({n: m.description()[0] for n, m in loaded.items()}))
"""


def module_of(problem):
    """What solves and judges a problem of its family."""
    return attention_running if isinstance(problem, AttentionProblem) else running


# The ISA level


@pytest.mark.parametrize("level", LEVELS)
def test_forced_level_runs_and_is_right(level, tmp_path):
    """Only its modules are loaded, they are of its width, and their results are the reference's."""
    loaded = json.loads(python(SOLVE, tmp_path / "found", env={"FASTSEQ_CPU": level}))
    lanes = {bits: REGISTER_BYTES[level] * 8 // bits for bits in (32, 64)}
    below = "avx512" if level == "amx" else level
    expected = {f"{stem}_{below}_f{bits}": n for stem in STEMS for bits, n in lanes.items()}
    if level == "amx":
        expected["attention_amx_f32"] = expected.pop("attention_avx512_f32")
    assert loaded == expected
    found = np.load(tmp_path / "found.npz")
    for problem in PROBLEMS:
        ref, peer = module_of(problem).judge(problem)
        for part, expected in ref._asdict().items():
            ours = {name: found[f"{problem} {part} {name}"] for name in expected}
            room = peer and getattr(peer, part)
            assert_all_close(ours, expected, room, grad=part == "grads")


@pytest.mark.skipif("amx" not in LEVELS, reason="needs a CPU with AMX")
@pytest.mark.parametrize("file", ["test_attention", "test_attention_bits", "test_attention_masked"])
def test_amx_passes_attentions_tests(file):
    """The whole of them: the suite itself runs at the best level, which AMX is not."""
    path = Path(__file__).with_name(f"{file}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    env = os.environ | {"FASTSEQ_CPU": "amx"}
    done = subprocess.run([*command, "-k", "not f64"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_amx_that_the_system_refuses_raises(monkeypatch):
    monkeypatch.setattr(features, "supported", lambda: ["baseline", "amx"])
    monkeypatch.setattr(features, "request_tiles", lambda: False)
    monkeypatch.setenv("FASTSEQ_CPU", "amx")
    with pytest.raises(ValueError, match=r"^FASTSEQ_CPU=amx: the operating system refuses"):
        _dispatch.level.__wrapped__()
    monkeypatch.delenv("FASTSEQ_CPU")
    assert _dispatch.level.__wrapped__()[0] == "baseline"


def test_best_level_runs_unless_told(monkeypatch):
    monkeypatch.delenv("FASTSEQ_CPU", raising=False)
    level, why = _dispatch.level.__wrapped__()
    assert level == BEST and "the best of" in why
    monkeypatch.setenv("FASTSEQ_CPU", "baseline")
    level, why = _dispatch.level.__wrapped__()
    assert level == "baseline" and "FASTSEQ_CPU=baseline" in why


def test_unknown_or_unsupported_level_raises(monkeypatch):
    monkeypatch.setattr(features, "supported", lambda: ["baseline"])
    monkeypatch.setenv("FASTSEQ_CPU", "avx2")
    message = r"^FASTSEQ_CPU=avx2: this machine supports only baseline$"
    with pytest.raises(ValueError, match=message):
        _dispatch.level.__wrapped__()
    monkeypatch.setenv("FASTSEQ_CPU", "sse9")
    message = "^FASTSEQ_CPU must be one of baseline avx2 avx512 amx, got 'sse9'$"
    with pytest.raises(ValueError, match=message):
        _dispatch.level.__wrapped__()


CALLS_RAISE = """
import numpy as np, fastseq
for call in (lambda: fastseq.rnn(*(np.zeros(s, "f4") for s in ((1, 1, 1), (1, 1), (1, 1)))),
             fastseq.show_config):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("name", "value"), [("FASTSEQ_CPU", "sse9"), ("FASTSEQ_NUM_THREADS", "many")]
)
def test_a_setting_that_cannot_be_honoured_stops_every_call(name, value):
    """Not only the first: what failed is not remembered as something else."""
    told = python(CALLS_RAISE, env={name: value}).splitlines()
    assert len(told) == 2 and told[0] == told[1]
    assert told[0].startswith(f"{name} must be ") and told[0].endswith(f"got '{value}'")


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_objects_hold_only_their_level(level):
    """No wider register, and at the baseline no VEX instruction, in any compiled module."""
    objdump = shutil.which("objdump")
    folder = Path(features.__file__).parent
    modules = [f"{stem}_{level}_f{bits}" for stem in STEMS for bits in (32, 64)]
    objects = [p for module in modules for p in folder.glob(f"{module}.*.so")]
    if not objdump or len(LEVELS) == 1 or not objects:
        pytest.skip("needs objdump, and modules built for x86-64")
    assert len(objects) == len(modules)
    objects += folder.glob("features.*.so") if level == "baseline" else []
    beyond = {"baseline": r"%[yz]mm|\tv\w+ .*%xmm", "avx2": r"%zmm", "avx512": r"(?!)"}[level]
    width = {"baseline": "%xmm", "avx2": "%ymm", "avx512": "%zmm"}[level]
    for path in objects:
        command = [objdump, "--disassemble", "--no-show-raw-insn", str(path)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert not re.search(beyond, code), path.name
        assert path.stem.startswith("features") or code.count(width) > 1000


# The thread count


@pytest.fixture
def many_cores(monkeypatch):
    """A machine of 64 cores without settings."""
    for name in ("OMP_NUM_THREADS", "FASTSEQ_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_dispatch.os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(_dispatch, "_cgroup_cpus", lambda: None)
    monkeypatch.setattr(_dispatch, "_limits", _dispatch._limits.__wrapped__)
    monkeypatch.setattr(_dispatch, "_fixed_limit", _dispatch._fixed_limit.__wrapped__)
    monkeypatch.setattr(_dispatch._Threads, "user", None)
    monkeypatch.setattr(_dispatch, "sys", SimpleNamespace(modules={}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 64),
        ({"FASTSEQ_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"OMP_NUM_THREADS": "5", "FASTSEQ_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2", "FASTSEQ_NUM_THREADS": "3"}, 2),
        ({"FASTSEQ_NUM_THREADS": "1000"}, 64),
    ],
    ids=str,
)
def test_thread_settings(many_cores, monkeypatch, settings, expected):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert fastseq.get_num_threads() == expected


@pytest.mark.parametrize("name", ["FASTSEQ_NUM_THREADS", "OMP_NUM_THREADS"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "²"])
def test_invalid_thread_settings_raise(many_cores, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name} must be a positive integer, got '{value}'$"):
        fastseq.get_num_threads()


def test_set_num_threads(many_cores):
    fastseq.set_num_threads(3)
    assert fastseq.get_num_threads() == 3
    fastseq.set_num_threads(1000)
    assert fastseq.get_num_threads() == 64
    fastseq.set_num_threads(None)
    assert fastseq.get_num_threads() == 64


def test_torch_setting_is_respected(many_cores, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(_dispatch.sys.modules, "torch", torch)  # as if imported just now
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        assert fastseq.get_num_threads() == 7
        fastseq.set_num_threads(3)
        assert fastseq.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# Prints the process's threads: before, after work too small to share, after 3 threads shared some.
COUNT_THREADS = """
import os, sys
import attention_running
from attention_problems import AttentionProblem
from problems import Problem, forward
import fastseq
from fastseq import _dispatch
def count():
    print(len(os.listdir("/proc/self/task")), end=" ")
count()
_dispatch._Threads.forced = 3
if sys.argv[1] == "gru":
    forward(fastseq, Problem("gru", T=3, B=2, H=5))
    count()
    forward(fastseq, Problem("gru", T=9, B=26, H=150))
else:
    attention_running.solve(AttentionProblem())
    count()
    attention_running.forward(AttentionProblem(L=60, S=80))
count()
"""


@pytest.mark.parametrize("size, expected", [("2048K", 2 << 20), ("?", 1 << 20), (None, 1 << 20)])
def test_l2_is_what_the_system_says(tmp_path, monkeypatch, size, expected):
    caches = {"index0": ("1", "48K"), "index2": ("2", size), "index3": ("3", "32768K")}
    for name, (level, its_size) in caches.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "level").write_text(f"{level}\n")
        if its_size:
            (tmp_path / name / "size").write_text(f"{its_size}\n")
    monkeypatch.setattr(_dispatch, "_CACHES", tmp_path)
    assert _dispatch.l2_bytes.__wrapped__() == expected


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("function", ["gru", "attention"])
def test_work_is_shared_and_small_work_is_not(function):
    before, small, shared = map(int, python(COUNT_THREADS, function).split())
    assert small == before
    assert shared == before + 2


# What is told, and what is imported for it

# Hides all optional packages: no finder finds them. Then runs the rest of the arguments.
NUMPY_ONLY = f"""
import sys
HEAVY = {HEAVY!r}
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in HEAVY else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import runpy
sys.argv = ["fastseq", *sys.argv[1:]]
try:
    runpy.run_module("fastseq", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert not HEAVY & set(sys.modules)
"""


def test_info_needs_only_numpy():
    found = json.loads(python(NUMPY_ONLY, "info", "--json", env={"FASTSEQ_NUM_THREADS": "1"}))
    assert found["level"]["used"] == BEST
    assert found["level"]["register_bits"] == REGISTER_BYTES[BEST] * 8
    assert found["threads"]["used"] == 1 and "FASTSEQ_NUM_THREADS" in found["threads"]["why"]
    assert found["numpy"] == np.__version__
    assert found["gpu"] == {"used": False, "why": "torch is not installed", "devices": []}
    assert HEAVY >= {n for n, version in found["optional"].items() if version is None} >= {"torch"}
    text = python(NUMPY_ONLY, "info", env={"FASTSEQ_CPU": "baseline"})
    assert "baseline (128 bits): FASTSEQ_CPU=baseline" in text
    assert re.search(r"^torch +absent$", text, re.M)
    assert re.search(r"^gpu +none: torch is not installed$", text, re.M)


def test_show_config_prints_what_info_does(capsys):
    fastseq.show_config(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["threads"]["used"] == fastseq.get_num_threads()
    assert found["level"]["used"] == _dispatch.level()[0]


def test_import_and_calls_import_nothing_heavy():
    code = """
import sys
import attention_running, running
from attention_problems import AttentionProblem
from problems import CELLS, Problem
for cell in CELLS:
    running.solve(Problem(cell))
attention_running.solve(AttentionProblem())
print(*sys.modules)
"""
    loaded = {name.split(".")[0] for name in python(code).split()}
    assert "fastseq" in loaded
    assert not loaded & HEAVY
