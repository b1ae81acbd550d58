/* Noting chains in an inflight area; see inflight_api.h. Not seen by Python. */

#ifndef VU_INFLIGHT_H
#define VU_INFLIGHT_H

#include "ring.h"

#include "inflight_api.h"

/* A chain was taken; returns its entry. */
uint32_t note_taken(const struct vu_queue *queue, struct vu_inflight *inflight, const struct vu_chain *chain);

/* The chain of an entry is about to be shown to the driver, and was. */
void note_giving(const struct vu_queue *queue, struct vu_inflight *inflight, uint32_t entry);
void note_given(const struct vu_queue *queue, struct vu_inflight *inflight, uint32_t entry);

#endif
