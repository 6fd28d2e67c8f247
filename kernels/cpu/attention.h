/* attention.h: the vocabulary of the attention kernels, in four parts. */
#ifndef FASTSEQ_ATTENTION_H
#define FASTSEQ_ATTENTION_H

#include "attention_decode.h"
#include "attention_gradients.h"
#include "attention_panels.h"
#include "attention_scores.h"

#endif
