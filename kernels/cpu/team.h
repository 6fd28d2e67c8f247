/* team.h: threads. The pool is libgomp's, found by name at import: it is the one torch
 * uses where torch ships the same name, no compiler flag is needed, and without libgomp
 * everything runs on the calling thread.
 */
#ifndef FASTSEQ_TEAM_H
#define FASTSEQ_TEAM_H

#include <dlfcn.h>
#include <sched.h>
#include <stdint.h>

typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*rank)(void);
    int (*size)(void);
} Gomp;

static Gomp gomp_open(void) {
    void *lib = dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);
    Gomp g = {0};
    if (lib) {
        *(void **)&g.parallel = dlsym(lib, "GOMP_parallel");
        *(void **)&g.rank = dlsym(lib, "omp_get_thread_num");
        *(void **)&g.size = dlsym(lib, "omp_get_num_threads");
        if (!g.parallel || !g.rank || !g.size)
            g.parallel = 0;
    }
    return g;
}

/* A barrier for `size` threads. Spins about 20 us, then yields: on a busy machine it gets slower,
 * not stuck. Starts zeroed; each count on its own cache line. */
typedef struct {
    int arrived __attribute__((aligned(64)));
    int phase __attribute__((aligned(64)));
} Barrier;

static inline void barrier_wait(Barrier *b, int size) {
    if (size == 1)
        return;
    int phase = __atomic_load_n(&b->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&b->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
        if (spins < 1024) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        } else {
            sched_yield();
        }
    }
}

/* The counter's value before n was added: tasks are dealt out by it. */
static inline int64_t fetch_add(int64_t *counter, int64_t n) {
    return __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

#endif
