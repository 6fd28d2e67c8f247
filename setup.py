"""Build the CPU kernels: one source, one extension per ISA level and dtype."""

import platform
from copy import copy
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU = Path("kernels/cpu")
HEADERS = [str(p) for p in CPU.iterdir() if p.suffix in {".h", ".pxi"}]
# No -ffast-math: NaN and infinity keep their meaning, and linking it would flush denormals
# in the whole process.
# Aligned loops: a change elsewhere in the file must not move a hot one; GRU at B = 1 lost 5 % so.
FLAGS = [
    "-O3",
    "-falign-loops=64",
    "-falign-functions=64",
    "-std=gnu11",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
FLAGS += [
    "-fno-semantic-interposition",
    "-Wno-unused-function",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
X86 = platform.machine().lower() in {"x86_64", "amd64"}
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# level -> (vector bytes, flags): the flags are what kernels/cpu/features.pyx asks the CPU for
LEVELS = {"baseline": (16, [])}
# of float32 attention alone; all else at this level is that of avx512
AMX_LEVEL = {}
if X86:
    LEVELS["avx2"] = (32, AVX2)
    LEVELS["avx512"] = (64, AVX512)
    AMX_LEVEL["amx"] = (64, [*AVX512, "-mamx-tile", "-mamx-bf16"])


class BuildPerVariant(build_ext):
    """Every variant compiles the same file, so each has its own object folder; all cores build."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or True

    def build_extension(self, ext):
        own = copy(self)  # build_extension runs in threads
        own.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(own, ext)


def c_source(stem: str) -> str:
    """Cythonise one source once; the C file stays in build/."""
    module = Extension(f"fastseq.kernels.cpu.{stem}", [str(CPU / f"{stem}.pyx")], depends=HEADERS)
    return cythonize([module], build_dir="build")[0].sources[0]


def variants(stem: str, levels: dict[str, tuple[int, list[str]]], *bits: int) -> list[Extension]:
    """`<stem>_<level>_f<bits>` for every level and dtype, e.g. recurrent_avx512_f32."""
    source = c_source(stem)
    return [
        Extension(
            f"fastseq.kernels.cpu.{stem}_{level}_f{width}",
            [source],
            depends=HEADERS,
            include_dirs=[str(CPU)],
            define_macros=[
                ("VBYTES", str(vector_bytes)),
                ("REAL_BITS", str(width)),
                (f"PyInit_{stem}", f"PyInit_{stem}_{level}_f{width}"),
            ],
            extra_compile_args=FLAGS + isa,
            libraries=["dl", "m"],
        )
        for level, (vector_bytes, isa) in levels.items()
        for width in bits
    ]


features = Extension("fastseq.kernels.cpu.features", [c_source("features")])
setup(
    ext_modules=[
        features,
        *variants("recurrent", LEVELS, 32, 64),
        *variants("attention", LEVELS, 32, 64),
        *variants("attention", AMX_LEVEL, 32),
    ],
    cmdclass={"build_ext": BuildPerVariant},
)
