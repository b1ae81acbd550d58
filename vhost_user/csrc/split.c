/* Split virtqueues: the standard's clause "Split Virtqueues". Its names, with the area's in front. */

#include <string.h>

#include "ring.h"

enum {
	AVAIL_FLAGS = 0,
	AVAIL_IDX = 2,
	AVAIL_RING = 4,
	USED_FLAGS = 0,
	USED_IDX = 2,
	USED_RING = 4,
};

#define VIRTQ_AVAIL_F_NO_INTERRUPT 1
#define VIRTQ_USED_F_NO_NOTIFY 1

struct used_element {
	uint32_t id, length;
};

/* Behind the last entry of the available ring. */
static char *used_event(const struct vu_queue *queue, const struct areas *areas)
{
	return areas->driver + AVAIL_RING + sizeof(uint16_t) * queue->size;
}

/* Behind the last entry of the used ring. */
static char *avail_event(const struct vu_queue *queue, const struct areas *areas)
{
	return areas->device + USED_RING + sizeof(struct used_element) * queue->size;
}

static enum vu_malformed walk(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain)
{
	uint64_t table = queue->desc.address;
	uint32_t entries = queue->size, left = entries, index = chain->id;
	bool indirect = false;

	while (left--) {
		struct vu_descriptor descriptor;
		enum vu_malformed fault;
		uint16_t flags;

		chain->visited++;
		read_descriptor(memory, table + index * sizeof(descriptor), &descriptor);
		flags = descriptor.tail[0];
		if (flags & VIRTQ_DESC_F_INDIRECT) {
			if (indirect)
				return VU_MALFORMED_INDIRECT_NESTED;
			fault = check_indirect(queue, memory, &descriptor, flags & VIRTQ_DESC_F_NEXT);
			if (fault)
				return fault;
			indirect = true;
			table = descriptor.address;
			entries = left = descriptor.length / sizeof(descriptor);
			index = 0;
			continue;
		}
		fault = add_segment(queue, memory, chain, &descriptor, flags & VIRTQ_DESC_F_WRITE);
		if (fault)
			return fault;
		if (!(flags & VIRTQ_DESC_F_NEXT))
			return VU_MALFORMED_NONE;
		index = descriptor.tail[1];
		if (index >= entries)
			return VU_MALFORMED_NEXT_OUT_OF_RANGE;
	}
	return VU_MALFORMED_LOOP;
}

enum vu_malformed reload_split(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
			       uint32_t head)
{
	*chain = (struct vu_chain){ .id = head, .slots = 1 };
	return walk(queue, memory, chain);
}

static bool available(const struct vu_queue *queue, const struct areas *areas)
{
	return load16(areas->driver + AVAIL_IDX) != queue->next_avail;
}

static int take(struct vu_queue *queue, const struct vu_memory *memory, const struct areas *areas,
		struct vu_chain *chain, struct vu_descriptor *ring, enum vu_malformed *fault)
{
	uint16_t idx = load16(areas->driver + AVAIL_IDX);
	uint16_t waiting = idx - queue->next_avail;
	uint16_t in_flight = queue->next_avail - queue->next_used;
	uint16_t head;

	/* Each chain, waiting or in flight, has a descriptor of its own; this also holds what a device may keep down. */
	if (waiting > queue->size - in_flight)
		return break_ring(queue, VU_BROKEN_AVAIL_IDX, idx);
	if (!waiting)
		return 0;
	head = load16(areas->driver + AVAIL_RING + sizeof(head) * (queue->next_avail % queue->size));
	if (head >= queue->size)
		return break_ring(queue, VU_BROKEN_HEAD, head);
	queue->next_avail++;
	*fault = reload_split(queue, memory, chain, head);
	(void)ring;
	return 1;
}

static void give(struct vu_queue *queue, const struct areas *areas, uint32_t id, uint32_t slots, uint32_t written)
{
	struct used_element element = { htole32(id), htole32(written) };

	memcpy(areas->device + USED_RING + sizeof(element) * (queue->next_used % queue->size), &element, sizeof(element));
	queue->next_used += slots;
	store16(areas->device + USED_IDX, queue->next_used);
}

static bool wants_notification(const struct vu_queue *queue, const struct areas *areas)
{
	uint16_t since;

	if (!queue->event_idx)
		return !(load16(areas->driver + AVAIL_FLAGS) & VIRTQ_AVAIL_F_NO_INTERRUPT);
	/* How many entries were used after the one that used_event names. */
	since = queue->next_used - load16(used_event(queue, areas)) - 1;
	return since < queue->pending;
}

static void advise(const struct vu_queue *queue, const struct areas *areas, bool enable)
{
	/* With the event index the flags stay 0, and an avail_event left behind is the whole advice. */
	if (!queue->event_idx)
		store16(areas->device + USED_FLAGS, enable ? 0 : VIRTQ_USED_F_NO_NOTIFY);
	else if (enable)
		store16(avail_event(queue, areas), queue->next_avail);
}

const struct format vu_split_format = { take, give, wants_notification, advise, available };
