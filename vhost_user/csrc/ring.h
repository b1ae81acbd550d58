/* What the two ring formats share. Not seen by Python. */

#ifndef VU_RING_H
#define VU_RING_H

#include "memory.h"
#include "ring_api.h"

#define VIRTQ_DESC_F_NEXT 1
#define VIRTQ_DESC_F_WRITE 2
#define VIRTQ_DESC_F_INDIRECT 4

/* A descriptor as it lies in guest memory. The tail is flags and next (split), or buffer id and flags (packed). */
struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t tail[2];
};

/* Where the areas lie in this process, for the length of one call. */
struct areas {
	char *desc, *driver, *device;
};

/* What differs between split and packed rings. */
struct format {
	/*
	 * Reads the next available chain and moves past it. Returns 1 with its fault in `*fault` (the chain's id and
	 * slots are right even so), 0 if there is none, or VU_RING_BROKEN.
	 */
	int (*take)(struct vu_queue *queue, const struct vu_memory *memory, const struct areas *areas,
		    struct vu_chain *chain, enum vu_malformed *fault);
	/* Shows a used chain to the driver and moves past it. */
	void (*give)(struct vu_queue *queue, const struct areas *areas, uint32_t id, uint32_t slots, uint32_t written);
	/* Whether the driver wants to hear of the last `pending` slots. */
	bool (*wants_notification)(const struct vu_queue *queue, const struct areas *areas);
	void (*advise)(const struct vu_queue *queue, const struct areas *areas, bool enable);
	bool (*available)(const struct vu_queue *queue, const struct areas *areas);
};

extern const struct format vu_split_format, vu_packed_format;

/* Copies one descriptor, so that what is checked is what is used. It lies in memory: the caller looked. */
void read_descriptor(const struct vu_memory *memory, uint64_t address, struct descriptor *descriptor);

/* Adds a buffer to the chain, or says what is wrong with it. */
enum vu_malformed add_segment(const struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
			      const struct descriptor *descriptor, bool writable);

/* What is wrong, if anything, with a descriptor that refers to an indirect table. */
enum vu_malformed check_indirect(const struct vu_queue *queue, const struct vu_memory *memory,
				 const struct descriptor *descriptor, bool chained);

/* Marks the ring broken until it is made anew. */
int break_ring(struct vu_queue *queue, enum vu_broken why, uint32_t value);

#endif
