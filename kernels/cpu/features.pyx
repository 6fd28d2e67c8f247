# cython: language_level=3
# cython: freethreading_compatible=True
"""Which ISA levels this CPU and operating system support; built for the baseline."""

cdef extern from *:
    """
    #if defined(__x86_64__)
    /* __builtin_cpu_supports also asks the OS (XGETBV). The lists are the -m flags of setup.py. */
    static int fastseq_avx2(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
            && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    }
    static int fastseq_avx512(void) {
        return fastseq_avx2()
            && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    #else
    static int fastseq_avx2(void) { return 0; }
    static int fastseq_avx512(void) { return 0; }
    #endif
    """
    bint fastseq_avx2()
    bint fastseq_avx512()


def supported():
    """The levels this machine can run, in ascending order."""
    return ["baseline"] + ["avx2"] * fastseq_avx2() + ["avx512"] * fastseq_avx512()
