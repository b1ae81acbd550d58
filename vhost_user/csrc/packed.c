/* Packed virtqueues: the standard's clause "Packed Virtqueues". */

#include <string.h>

#include "ring.h"

#define VIRTQ_DESC_F_AVAIL (1 << 7)
#define VIRTQ_DESC_F_USED (1 << 15)

#define RING_EVENT_FLAGS_ENABLE 0
#define RING_EVENT_FLAGS_DISABLE 1
#define RING_EVENT_FLAGS_DESC 2
#define RING_EVENT_FLAGS_MASK 3

enum {
	DESC_LENGTH = 8,
	DESC_ID = 12,
	DESC_FLAGS = 14,
};

/*
 * A slot and its wrap counter as one position on a circle of two laps: laps with the counter at 1 come first. On it
 * distances are exact, up to the 2 * size slots after which a slot comes round with the same counter.
 */
static uint32_t position(const struct vu_queue *queue, uint32_t slot, bool wrap)
{
	return wrap ? slot : slot + queue->size;
}

static uint32_t distance(const struct vu_queue *queue, uint32_t from, uint32_t to)
{
	return (to + 2 * queue->size - from) % (2 * queue->size);
}

/* Moves one slot, or as many as a chain has, and says so to the wrap counter. */
static void advance(const struct vu_queue *queue, uint16_t *slot, uint8_t *wrap, uint32_t slots)
{
	uint32_t next = *slot + slots;

	if (next >= queue->size) {
		next -= queue->size;
		*wrap ^= 1;
	}
	*slot = next;
}

static bool is_available(uint16_t flags, bool wrap)
{
	return !!(flags & VIRTQ_DESC_F_AVAIL) == wrap && !!(flags & VIRTQ_DESC_F_USED) != wrap;
}

static char *slot_at(const struct areas *areas, uint32_t slot)
{
	return areas->desc + slot * sizeof(struct vu_descriptor);
}

static bool available(const struct vu_queue *queue, const struct areas *areas)
{
	return is_available(load16(slot_at(areas, queue->next_avail) + DESC_FLAGS), queue->avail_wrap);
}

static enum vu_malformed walk_indirect(struct vu_queue *queue, const struct vu_memory *memory,
				       struct vu_chain *chain, const struct vu_descriptor *table, bool more)
{
	enum vu_malformed fault = check_indirect(queue, memory, table, more || chain->slots > 1);

	for (uint32_t at = 0; !fault && at < table->length; at += sizeof(struct vu_descriptor)) {
		struct vu_descriptor entry;

		chain->visited++;
		/* In an indirect table of a packed ring WRITE is the only flag that is not reserved. */
		read_descriptor(memory, table->address + at, &entry);
		fault = add_segment(queue, memory, chain, &entry, entry.tail[1] & VIRTQ_DESC_F_WRITE);
	}
	return fault;
}

/* Adds what one descriptor of the ring refers to. `flags` are its own; `more` says that another one follows. */
static enum vu_malformed add(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
			     const struct vu_descriptor *descriptor, uint16_t flags, bool more)
{
	if (flags & VIRTQ_DESC_F_INDIRECT)
		return walk_indirect(queue, memory, chain, descriptor, more);
	return add_segment(queue, memory, chain, descriptor, flags & VIRTQ_DESC_F_WRITE);
}

enum vu_malformed rebuild_packed(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
				 const struct vu_descriptor *ring, uint32_t count)
{
	enum vu_malformed fault = VU_MALFORMED_NONE;

	*chain = (struct vu_chain){ .id = ring[count - 1].tail[0], .visited = count };
	while (!fault && chain->slots < count) {
		const struct vu_descriptor *descriptor = &ring[chain->slots++];

		fault = add(queue, memory, chain, descriptor, descriptor->tail[1], chain->slots < count);
	}
	chain->slots = count;
	return fault;
}

static int take(struct vu_queue *queue, const struct vu_memory *memory, const struct areas *areas,
		struct vu_chain *chain, struct vu_descriptor *ring, enum vu_malformed *fault)
{
	uint32_t in_flight = distance(queue, position(queue, queue->next_used, queue->used_wrap),
				      position(queue, queue->next_avail, queue->avail_wrap));
	uint16_t slot = queue->next_avail, flags = load16(slot_at(areas, slot) + DESC_FLAGS);
	uint8_t wrap = queue->avail_wrap;
	struct vu_descriptor descriptor;

	if (!is_available(flags, wrap))
		return 0;
	*chain = (struct vu_chain){ 0 };
	/* The id is in the list's last descriptor, so a fault is no reason to stop, and a list without end is fatal. */
	do {
		if (chain->slots + in_flight == queue->size)
			return break_ring(queue, VU_BROKEN_LIST_LENGTH, chain->slots + 1);
		read_descriptor(memory, queue->desc.address + slot * sizeof(descriptor), &descriptor);
		/* The first one's flags are those that were loaded with acquire order. */
		if (chain->slots)
			flags = descriptor.tail[1];
		if (!is_available(flags, wrap))
			return break_ring(queue, VU_BROKEN_LIST_FLAGS, flags);
		if (ring) {
			ring[chain->slots] = descriptor;
			ring[chain->slots].tail[1] = flags;
		}
		chain->slots++;
		chain->visited++;
		if (!*fault)
			*fault = add(queue, memory, chain, &descriptor, flags, flags & VIRTQ_DESC_F_NEXT);
		advance(queue, &slot, &wrap, 1);
	} while (flags & VIRTQ_DESC_F_NEXT);
	chain->id = descriptor.tail[0];
	queue->next_avail = slot;
	queue->avail_wrap = wrap;
	return 1;
}

static void give(struct vu_queue *queue, const struct areas *areas, uint32_t id, uint32_t slots, uint32_t written)
{
	char *slot = slot_at(areas, queue->next_used);
	uint16_t flags = queue->used_wrap ? VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED : 0;
	uint32_t length = htole32(written);
	uint16_t buffer_id = htole16(id);

	memcpy(slot + DESC_LENGTH, &length, sizeof(length));
	memcpy(slot + DESC_ID, &buffer_id, sizeof(buffer_id));
	store16(slot + DESC_FLAGS, flags | (written ? VIRTQ_DESC_F_WRITE : 0));
	advance(queue, &queue->next_used, &queue->used_wrap, slots);
}

/* An event suppression structure as one integer: offset in bits 0 to 14, wrap counter in 15, flags in 16 and 17. */
static bool wants_notification(const struct vu_queue *queue, const struct areas *areas)
{
	uint32_t event = load32(areas->driver), slot = event & 0x7fff, flags = event >> 16 & RING_EVENT_FLAGS_MASK;
	uint32_t next = position(queue, queue->next_used, queue->used_wrap);

	if (flags == RING_EVENT_FLAGS_DISABLE)
		return false;
	/* What can't be right gets a notification: one too many is harmless. */
	if (flags != RING_EVENT_FLAGS_DESC || !queue->event_idx || slot >= queue->size)
		return true;
	return distance(queue, position(queue, slot, event >> 15 & 1) + 1, next) < queue->pending;
}

static void advise(const struct vu_queue *queue, const struct areas *areas, bool enable)
{
	uint32_t event = RING_EVENT_FLAGS_DISABLE << 16;

	if (enable && queue->event_idx)
		event = RING_EVENT_FLAGS_DESC << 16 | queue->avail_wrap << 15 | queue->next_avail;
	else if (enable)
		event = RING_EVENT_FLAGS_ENABLE << 16;
	store32(areas->device, event);
}

const struct format vu_packed_format = { take, give, wants_notification, advise, available };
