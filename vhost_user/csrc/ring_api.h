/*
 * The device side of a virtqueue, split or packed; vring/__init__.py has the theory. The Python names of the reasons
 * below are these without their prefix, in lower case.
 */

/* Why a chain went back to the driver with length 0 instead of to the device. */
enum vu_malformed {
	VU_MALFORMED_NONE,
	VU_MALFORMED_LOOP,
	VU_MALFORMED_TOO_LONG,
	VU_MALFORMED_TOO_MANY_BYTES,
	VU_MALFORMED_NEXT_OUT_OF_RANGE,
	VU_MALFORMED_ZERO_LENGTH,
	VU_MALFORMED_OUTSIDE_MEMORY,
	VU_MALFORMED_READABLE_AFTER_WRITABLE,
	VU_MALFORMED_INDIRECT_NOT_NEGOTIATED,
	VU_MALFORMED_INDIRECT_LENGTH,
	VU_MALFORMED_INDIRECT_NESTED,
	VU_MALFORMED_INDIRECT_CHAINED,
	VU_MALFORMED_KINDS,
};

/* Why the ring can't go on. */
enum vu_broken {
	VU_BROKEN_NOT,
	VU_BROKEN_HEAD,
	VU_BROKEN_AVAIL_IDX,
	VU_BROKEN_LIST_LENGTH,
	VU_BROKEN_LIST_FLAGS,
	VU_BROKEN_NO_MEMORY,
};

/*
 * What a call returns instead of its result: the queue's `broken` says why; an area is not in the table; see take; what
 * the queue's `miss` says is not in the table, and the call is to be made again once it is there.
 */
enum vu_failure {
	VU_RING_BROKEN = -1,
	VU_RING_UNMAPPED = -2,
	VU_RING_MALFORMED = -3,
	VU_RING_MISS = -4,
};

/* One of the ring's three parts. */
struct vu_area {
	uint64_t address;
	uint32_t size, alignment;
};

/* An address that is in no region, or may not be accessed as one wanted to: bits of enum vu_access. */
struct vu_miss {
	uint64_t address;
	uint32_t access;
};

struct vu_queue {
	/* The Descriptor Area, the Driver Area (available ring) and the Device Area (used ring). */
	struct vu_area desc, driver, device;
	uint32_t size;
	uint8_t packed, event_idx, indirect;
	/* The table comes and goes piece by piece, as an IOMMU's does: what is not there is a miss, and nobody's fault. */
	uint8_t translated;
	/* Split: free-running counters. Packed: slots of the ring, each with its wrap counter, 0 or 1. */
	uint8_t avail_wrap, used_wrap;
	uint16_t next_avail, next_used;
	/* Slots used since the last decision to notify or not; stops counting at 65536 or a little more. */
	uint32_t pending;
	/* An enum vu_broken, and the value that broke it. */
	uint32_t broken, broken_value;
	uint64_t malformed[VU_MALFORMED_KINDS];
	/* What was looked for last and not found. */
	struct vu_miss miss;
};

/* A descriptor, in host byte order. The tail is flags and next (split), or buffer id and flags (packed). */
struct vu_descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t tail[2];
};

/* A contiguous guest range. */
struct vu_segment {
	uint64_t address, length;
};

/* One buffer of the driver's: first the segments to read, then the segments to write. */
struct vu_chain {
	uint32_t id;                   /* the head's index (split), the buffer's id (packed) */
	uint32_t slots;                /* how far its use moves the ring: 1 (split), its ring descriptors (packed) */
	uint32_t visited;              /* descriptors read, those of indirect tables too */
	uint32_t readables, writables; /* numbers of segments */
	uint64_t readable, writable;   /* bytes */
	struct vu_segment segments[];
};

/*
 * Takes the next good chain into `chain`, which has room for `size` segments; returns how many it has, or 0. Malformed
 * chains on the way are given back, until about 3 * size descriptors were read: then too it returns 0, so that no
 * driver can hold the caller here.
 */
int vu_queue_pop(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain);

/*
 * The same in single steps, for who has to note each chain: takes the next one, good or not. A malformed one is counted
 * and answered by VU_RING_MALFORMED; its id and slots are right, and the caller gives it back. Unless `ring` is NULL, a
 * packed queue copies the chain's ring descriptors there; it has room for `size`.
 */
int vu_queue_take(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
		  struct vu_descriptor *ring);

/*
 * Takes again what was taken before this queue was made, and counts as in flight: of a split queue the chain with this
 * head, of a packed one the chain of these `count` (1 to `size`) ring descriptors. They answer as `take` does.
 */
int vu_queue_reload(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain, uint32_t head);
int vu_queue_rebuild(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
		     const struct vu_descriptor *ring, uint32_t count);

/* Gives a chain back, `written` bytes of its writable part filled from the front. */
int vu_queue_push(struct vu_queue *queue, const struct vu_memory *memory, uint32_t id, uint32_t slots,
		  uint64_t written);

/* Whether what was given back since the last call asks for a used buffer notification. */
int vu_queue_should_notify(struct vu_queue *queue, const struct vu_memory *memory);

/* Advises the driver not to send available buffer notifications. */
int vu_queue_disable_notifications(struct vu_queue *queue, const struct vu_memory *memory);

/* Asks for them again; 1 if something is available already, of which no notification will tell. */
int vu_queue_enable_notifications(struct vu_queue *queue, const struct vu_memory *memory);

/*
 * Copies from the readable or to the writable part of a chain, `offset` bytes in: all or nothing, -EFAULT where its
 * memory is gone by now. `chain` is the struct vu_chain that pop made; the range lies within the part.
 */
int vu_chain_read(const struct vu_memory *memory, const void *chain, uint64_t offset, void *to, uint64_t length);
int vu_chain_write(const struct vu_memory *memory, const void *chain, uint64_t offset, const void *from,
		   uint64_t length);
