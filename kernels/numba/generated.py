"""Generated Numba modules: a file each, named by its contents, in the user's cache folder.

The folder is $FASTSEQ_CACHE, else $XDG_CACHE_HOME/fastseq, else ~/.cache/fastseq; where that cannot
be written, a new temporary one. Numba's own cache lies beside the file, so a kernel is compiled
once per machine.
"""

import atexit
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def folder():
    """Where generated modules go."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    wanted = Path(os.environ.get("FASTSEQ_CACHE") or Path(home) / "fastseq")
    with suppress(OSError):
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    temporary = tempfile.mkdtemp(prefix="fastseq-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def load(name, source, *helpers):
    """The module of this source; `helpers` are files whose code it compiles in."""
    content = hashlib.sha256(source.encode())
    for helper in helpers:
        content.update(Path(helper).read_bytes())
    module_name = f"{name}_{content.hexdigest()[:16]}"
    path = folder() / f"{module_name}.py"
    if not path.exists():
        _write(path, source)
    spec = importlib.util.spec_from_file_location(f"fastseq_generated.{module_name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _write(path, source):
    """At once: another process sees all of the file or none."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as file:
        file.write(source)
    os.replace(file.name, path)
