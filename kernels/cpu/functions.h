/* functions.h: vec.h's functions over arrays, by address: what a user's compiled
 * cell or score function calls.
 *
 * In place, n a multiple of VL. A call costs 2 ns beside the function itself.
 */
#ifndef FASTSEQ_FUNCTIONS_H
#define FASTSEQ_FUNCTIONS_H

#include "vec.h"

#define OVER_ARRAY(name, function)                                                                 \
    static void name(real *x, intptr_t n) {                                                        \
        for (intptr_t k = 0; k < n; k += VL)                                                       \
            store(x + k, function(load(x + k)));                                                   \
    }
OVER_ARRAY(exp_array, exp_)
OVER_ARRAY(tanh_array, tanh_)
OVER_ARRAY(sigmoid_array, sigmoid)

typedef void (*ArrayFn)(real *x, intptr_t n);

/* Addresses in this order; `tile_layout` tells it to Python. */
typedef struct {
    ArrayFn exp, tanh, sigmoid;
} Functions;

static const Functions functions = {exp_array, tanh_array, sigmoid_array};

#endif
