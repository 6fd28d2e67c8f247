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
    #include <cpuid.h>
    /* The CPU's tiles, and XGETBV's word that the OS saves them. */
    static int fastseq_amx(void) {
        enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, TILE_STATE = 3 << 17 };
        unsigned a, b, c, d, low, high;
        if (!fastseq_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)
            || !(d & AMX_BF16) || !(d & AMX_TILE))
            return 0;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return (low & TILE_STATE) == TILE_STATE;
    }
    #else
    static int fastseq_avx2(void) { return 0; }
    static int fastseq_avx512(void) { return 0; }
    static int fastseq_amx(void) { return 0; }
    #endif
    #if defined(__x86_64__) && defined(__linux__)
    #include <sys/syscall.h>
    #include <unistd.h>
    static int fastseq_request_tiles(void) {
        enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
        return fastseq_amx() && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
    }
    #else
    static int fastseq_request_tiles(void) { return fastseq_amx(); }
    #endif
    """
    bint fastseq_avx2()
    bint fastseq_avx512()
    bint fastseq_amx()
    bint fastseq_request_tiles()


def supported():
    """The levels this machine can run, in ascending order."""
    return (["baseline"] + ["avx2"] * fastseq_avx2() + ["avx512"] * fastseq_avx512()
            + ["amx"] * fastseq_amx())


def request_tiles():
    """Ask the OS to let this process use AMX, as Linux wants it; whether it does."""
    return bool(fastseq_request_tiles())
