/* What the two ring formats share. Not seen by Python. */

#ifndef VU_RING_H
#define VU_RING_H

#include "memory.h"
#include "ring_api.h"

#define VIRTQ_DESC_F_NEXT 1
#define VIRTQ_DESC_F_WRITE 2
#define VIRTQ_DESC_F_INDIRECT 4

/* Where the areas lie in this process, for the length of one call. */
struct areas {
	char *desc, *driver, *device;
};

/* What differs between split and packed rings. */
struct format {
	/*
	 * Reads the next available chain and moves past it. Returns 1 with its fault in `*fault` (the chain's id and
	 * slots are right even so), 0 if there is none, or VU_RING_BROKEN. `ring` is that of vu_queue_take.
	 */
	int (*take)(struct vu_queue *queue, const struct vu_memory *memory, const struct areas *areas,
		    struct vu_chain *chain, struct vu_descriptor *ring, enum vu_malformed *fault);
	/* Shows a used chain to the driver and moves past it. */
	void (*give)(struct vu_queue *queue, const struct areas *areas, uint32_t id, uint32_t slots, uint32_t written);
	/* Whether the driver wants to hear of the last `pending` slots. */
	bool (*wants_notification)(const struct vu_queue *queue, const struct areas *areas);
	void (*advise)(const struct vu_queue *queue, const struct areas *areas, bool enable);
	bool (*available)(const struct vu_queue *queue, const struct areas *areas);
};

extern const struct format vu_split_format, vu_packed_format;

const struct format *format_of(const struct vu_queue *queue);

/* The table may have changed since the last call, so nothing is kept: finding costs less than keeping it right. */
int find_areas(struct vu_queue *queue, const struct vu_memory *memory, struct areas *areas);

/* The format's `take`, after which a chain that misses memory is still the next one. */
int take_next(struct vu_queue *queue, const struct vu_memory *memory, const struct areas *areas, struct vu_chain *chain,
	      struct vu_descriptor *ring, enum vu_malformed *fault);

/* The format's `give`, counted for the next notification. */
void give_back(struct vu_queue *queue, const struct areas *areas, uint32_t id, uint32_t slots, uint32_t written);

/* vu_chain_read and vu_chain_write, for calls that are guarded as a whole. */
int read_chain(const struct vu_memory *memory, const struct vu_chain *from, uint64_t offset, char *to, uint64_t length);
int write_chain(const struct vu_memory *memory, const struct vu_chain *to, uint64_t offset, char *from,
		uint64_t length);

/* A ring that the host has no memory for: how far the call had got can't be told, so only a new ring can go on. */
int no_memory(struct vu_queue *queue);

/* Make a chain of what is known of it, and say what is wrong with it; see vu_queue_reload and vu_queue_rebuild. */
enum vu_malformed reload_split(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
			       uint32_t head);
enum vu_malformed rebuild_packed(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
				 const struct vu_descriptor *ring, uint32_t count);

/* Copies one descriptor, so that what is checked is what is used. It lies in memory: the caller looked. */
void read_descriptor(const struct vu_memory *memory, uint64_t address, struct vu_descriptor *descriptor);

/* Adds a buffer to the chain, or says what is wrong with it. */
enum vu_malformed add_segment(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
			      const struct vu_descriptor *descriptor, bool writable);

/* What is wrong, if anything, with a descriptor that refers to an indirect table. */
enum vu_malformed check_indirect(struct vu_queue *queue, const struct vu_memory *memory,
				 const struct vu_descriptor *descriptor, bool chained);

/* Marks the ring broken until it is made anew. */
int break_ring(struct vu_queue *queue, enum vu_broken why, uint32_t value);

#endif
