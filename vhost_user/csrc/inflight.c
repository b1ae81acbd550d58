/* Noting chains in an inflight area; see inflight_api.h. */

#include <string.h>

#include "inflight.h"

/*
 * Stores that a killed process leaves in this order: the compiler keeps volatile accesses as they are, and the process
 * is all that is killed. Areas are in the host's byte order.
 */
static void put8(uint8_t *at, uint8_t value)
{
	*(volatile uint8_t *)at = value;
}

static void put16(uint8_t *at, uint16_t value)
{
	*(volatile uint16_t *)at = value;
}

static void put32(uint8_t *at, uint32_t value)
{
	*(volatile uint32_t *)at = value;
}

static void put64(uint8_t *at, uint64_t value)
{
	*(volatile uint64_t *)at = value;
}

/* A split queue's area: where the words of its head and of an entry lie. */
enum {
	SPLIT_LAST_BATCH_HEAD = 12,
	SPLIT_USED_IDX = 14,
	SPLIT_HEAD = 16,
	SPLIT_NEXT = 6,
	SPLIT_COUNTER = 8,
	SPLIT_ENTRY = 16,
};

static uint8_t *split_entry(const struct vu_inflight *inflight, uint32_t entry)
{
	return inflight->area + SPLIT_HEAD + SPLIT_ENTRY * entry;
}

static uint32_t split_taken(struct vu_inflight *inflight, uint32_t head)
{
	uint8_t *entry = split_entry(inflight, head);

	put64(entry + SPLIT_COUNTER, inflight->counter++);
	put8(entry, 1);
	return head;
}

static void split_giving(const struct vu_inflight *inflight, uint32_t head)
{
	put16(split_entry(inflight, head) + SPLIT_NEXT, inflight->last_batch_head);
	put16(inflight->area + SPLIT_LAST_BATCH_HEAD, head);
}

static void split_given(struct vu_inflight *inflight, uint32_t head)
{
	inflight->last_batch_head = head;
	inflight->used_idx++;
	put8(split_entry(inflight, head), 0);
	put16(inflight->area + SPLIT_USED_IDX, inflight->used_idx);
}

/* A packed queue's area. The used words are stored as one. */
enum {
	PACKED_FREE_HEAD = 12,
	PACKED_OLD_FREE_HEAD = 14,
	PACKED_USED = 16,
	PACKED_HEAD = 32,
	PACKED_NEXT = 2,
	PACKED_LAST = 4,
	PACKED_NUM = 6,
	PACKED_COUNTER = 8,
	PACKED_ID = 16,
	PACKED_FLAGS = 18,
	PACKED_LENGTH = 20,
	PACKED_ADDRESS = 24,
	PACKED_ENTRY = 32,
};

struct position {
	uint16_t slot;
	uint8_t wrap;
};

static uint8_t *packed_entry(const struct vu_inflight *inflight, uint32_t entry)
{
	return inflight->area + PACKED_HEAD + PACKED_ENTRY * entry;
}

static struct position moved(const struct vu_queue *queue, struct position from, uint32_t slots)
{
	uint32_t slot = from.slot + slots;

	if (slot < queue->size)
		return (struct position){ slot, from.wrap };
	return (struct position){ slot - queue->size, !from.wrap };
}

static void put_used(const struct vu_inflight *inflight, struct position used, struct position old)
{
	struct {
		uint16_t slot, old_slot;
		uint8_t wrap, old_wrap, padding[2];
	} words = { used.slot, old.slot, used.wrap, old.wrap, { 0 } };
	uint64_t word;

	memcpy(&word, &words, sizeof(word));
	put64(inflight->area + PACKED_USED, word);
}

static uint32_t packed_taken(struct vu_inflight *inflight, uint32_t slots)
{
	uint32_t head = inflight->free_head, last = head, entry = head;
	uint8_t *first = packed_entry(inflight, head);

	put16(first + PACKED_NUM, slots);
	put64(first + PACKED_COUNTER, inflight->counter++);
	put8(first, 1);
	for (uint32_t slot = 0; slot < slots; slot++) {
		const struct vu_descriptor *descriptor = &inflight->taken[slot];
		uint8_t *at = packed_entry(inflight, entry);

		put64(at + PACKED_ADDRESS, descriptor->address);
		put32(at + PACKED_LENGTH, descriptor->length);
		put16(at + PACKED_FLAGS, descriptor->tail[1]);
		put16(at + PACKED_ID, descriptor->tail[0]);
		last = entry;
		entry = inflight->next[entry];
	}
	put16(first + PACKED_LAST, last);
	put16(inflight->area + PACKED_FREE_HEAD, entry);
	put16(inflight->area + PACKED_OLD_FREE_HEAD, entry);
	inflight->free_head = entry;
	inflight->last[head] = last;
	inflight->num[head] = slots;
	return head;
}

static void packed_giving(const struct vu_queue *queue, const struct vu_inflight *inflight, uint32_t entry)
{
	struct position old = { inflight->used_slot, inflight->used_wrap };

	put16(packed_entry(inflight, inflight->last[entry]) + PACKED_NEXT, inflight->free_head);
	put16(inflight->area + PACKED_FREE_HEAD, entry);
	put_used(inflight, moved(queue, old, inflight->num[entry]), old);
}

static void packed_given(const struct vu_queue *queue, struct vu_inflight *inflight, uint32_t entry)
{
	struct position used = { inflight->used_slot, inflight->used_wrap };

	used = moved(queue, used, inflight->num[entry]);
	inflight->next[inflight->last[entry]] = inflight->free_head;
	inflight->free_head = entry;
	inflight->used_slot = used.slot;
	inflight->used_wrap = used.wrap;
	put8(packed_entry(inflight, entry), 0);
	put16(inflight->area + PACKED_OLD_FREE_HEAD, entry);
	put_used(inflight, used, used);
}

uint32_t note_taken(const struct vu_queue *queue, struct vu_inflight *inflight, const struct vu_chain *chain)
{
	return queue->packed ? packed_taken(inflight, chain->slots) : split_taken(inflight, chain->id);
}

void note_giving(const struct vu_queue *queue, struct vu_inflight *inflight, uint32_t entry)
{
	if (queue->packed)
		packed_giving(queue, inflight, entry);
	else
		split_giving(inflight, entry);
}

void note_given(const struct vu_queue *queue, struct vu_inflight *inflight, uint32_t entry)
{
	if (queue->packed)
		packed_given(queue, inflight, entry);
	else
		split_given(inflight, entry);
}
