/*
 * What a queue's inflight area was told last, which nobody else writes: vhost_user/inflight/split.py and packed.py have
 * the areas, and the order of stores, which is the same here. `area` is the area in the shared buffer.
 *
 * The words behind `area` and `counter` are a split queue's: used_idx, last_batch_head; or a packed one's: free_head, the
 * used position, and of each entry its `next`, and of each that is a chain's first one the chain's last and number.
 */
struct vu_inflight {
	uint8_t *area;
	/* The next chain's. */
	uint64_t counter;
	uint16_t used_idx, last_batch_head;
	uint16_t free_head, used_slot;
	uint8_t used_wrap;
	uint16_t *next, *last, *num;
	/* Room for the ring's descriptors of one chain: those of a packed queue that was taken last. */
	struct vu_descriptor *taken;
};
