/* attention.h: the vocabulary of the attention kernels, in four parts; the products of
 * attention_amx.h or of attention_panels.h. */
#ifndef FASTSEQ_ATTENTION_H
#define FASTSEQ_ATTENTION_H

#include "attention_decode.h"
#include "attention_gradients.h"
#if defined(__AMX_BF16__) && REAL_BITS == 32
#include "attention_amx.h"
#else
#include "attention_panels.h"
#endif
#include "attention_scores.h"

#endif
