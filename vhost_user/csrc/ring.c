/* The device side of a virtqueue, as far as both formats agree; see ring_api.h. */

#include <errno.h>
#include <string.h>

#include "guard.h"
#include "ring.h"

const struct format *format_of(const struct vu_queue *queue)
{
	return queue->packed ? &vu_packed_format : &vu_split_format;
}

int break_ring(struct vu_queue *queue, enum vu_broken why, uint32_t value)
{
	queue->broken = why;
	queue->broken_value = value;
	return VU_RING_BROKEN;
}

/* Whether a part of a range is missing, and the queue remembers which. */
static bool misses(struct vu_queue *queue, const struct vu_memory *memory, uint64_t address, uint64_t length,
		   uint32_t access)
{
	uint64_t missing;

	if (!vu_memory_lacks(memory, address, length, access, &missing))
		return false;
	queue->miss = (struct vu_miss){ missing, access };
	return true;
}

static char *find_area(const struct vu_memory *memory, const struct vu_area *area)
{
	return vu_memory_at(memory, area->address, area->size, area->alignment, 0);
}

/* What the device does with the descriptors: in a packed ring they are where chains are given back, too. */
static uint32_t desc_access(const struct vu_queue *queue)
{
	return queue->packed ? VU_READ | VU_WRITE : VU_READ;
}

/* Whether an area of a queue whose table comes and goes is not there, or may not be used as it must be. */
static bool misses_area(struct vu_queue *queue, const struct vu_memory *memory)
{
	return misses(queue, memory, queue->desc.address, queue->desc.size, desc_access(queue)) ||
	       misses(queue, memory, queue->driver.address, queue->driver.size, VU_READ) ||
	       misses(queue, memory, queue->device.address, queue->device.size, VU_READ | VU_WRITE);
}

int find_areas(struct vu_queue *queue, const struct vu_memory *memory, struct areas *areas)
{
	if (queue->broken)
		return VU_RING_BROKEN;
	if (queue->translated && misses_area(queue, memory))
		return VU_RING_MISS;
	areas->desc = find_area(memory, &queue->desc);
	areas->driver = find_area(memory, &queue->driver);
	areas->device = find_area(memory, &queue->device);
	return areas->desc && areas->driver && areas->device ? 0 : VU_RING_UNMAPPED;
}

void read_descriptor(const struct vu_memory *memory, uint64_t address, struct vu_descriptor *descriptor)
{
	read_memory(memory, address, descriptor, sizeof(*descriptor));
	/* Nothing below may be compiled to read guest memory a second time. */
	atomic_signal_fence(memory_order_seq_cst);
	descriptor->address = le64toh(descriptor->address);
	descriptor->length = le32toh(descriptor->length);
	descriptor->tail[0] = le16toh(descriptor->tail[0]);
	descriptor->tail[1] = le16toh(descriptor->tail[1]);
}

enum vu_malformed add_segment(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
			      const struct vu_descriptor *descriptor, bool writable)
{
	uint32_t count = chain->readables + chain->writables;

	if (count == queue->size)
		return VU_MALFORMED_TOO_LONG;
	if (!descriptor->length)
		return VU_MALFORMED_ZERO_LENGTH;
	if (misses(queue, memory, descriptor->address, descriptor->length, writable ? VU_WRITE : VU_READ))
		return VU_MALFORMED_OUTSIDE_MEMORY;
	if (!writable && chain->writables)
		return VU_MALFORMED_READABLE_AFTER_WRITABLE;
	if (chain->readable + chain->writable + descriptor->length > UINT64_C(1) << 32)
		return VU_MALFORMED_TOO_MANY_BYTES;
	if (writable) {
		chain->writables++;
		chain->writable += descriptor->length;
	} else {
		chain->readables++;
		chain->readable += descriptor->length;
	}
	chain->segments[count] = (struct vu_segment){ descriptor->address, descriptor->length };
	return VU_MALFORMED_NONE;
}

enum vu_malformed check_indirect(struct vu_queue *queue, const struct vu_memory *memory,
				 const struct vu_descriptor *descriptor, bool chained)
{
	if (!queue->indirect)
		return VU_MALFORMED_INDIRECT_NOT_NEGOTIATED;
	if (chained)
		return VU_MALFORMED_INDIRECT_CHAINED;
	if (!descriptor->length || descriptor->length % sizeof(*descriptor))
		return VU_MALFORMED_INDIRECT_LENGTH;
	if (misses(queue, memory, descriptor->address, descriptor->length, VU_READ))
		return VU_MALFORMED_OUTSIDE_MEMORY;
	return VU_MALFORMED_NONE;
}

void give_back(struct vu_queue *queue, const struct areas *areas, uint32_t id, uint32_t slots, uint32_t written)
{
	format_of(queue)->give(queue, areas, id, slots, written);
	if (queue->pending < 65536)
		queue->pending += slots;
}

/* A chain that can't be had yet: its fault is the table's, and not the driver's. */
static bool is_miss(const struct vu_queue *queue, enum vu_malformed fault)
{
	return fault == VU_MALFORMED_OUTSIDE_MEMORY && queue->translated;
}

int take_next(struct vu_queue *queue, const struct vu_memory *memory, const struct areas *areas, struct vu_chain *chain,
	      struct vu_descriptor *ring, enum vu_malformed *fault)
{
	uint16_t next_avail = queue->next_avail;
	uint8_t avail_wrap = queue->avail_wrap;
	int taken = format_of(queue)->take(queue, memory, areas, chain, ring, fault);

	if (taken <= 0 || !is_miss(queue, *fault))
		return taken;
	queue->next_avail = next_avail;
	queue->avail_wrap = avail_wrap;
	return VU_RING_MISS;
}

static int pop(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	/* Chains without indirect tables share `size` descriptors: only an ill-willed driver makes one pop read more. */
	for (uint32_t visited = 0; !result && visited < 2 * queue->size; visited += chain->visited) {
		enum vu_malformed fault = VU_MALFORMED_NONE;
		int taken = take_next(queue, memory, &areas, chain, NULL, &fault);

		if (taken <= 0)
			return taken;
		if (!fault)
			return chain->readables + chain->writables;
		queue->malformed[fault]++;
		give_back(queue, &areas, chain->id, chain->slots, 0);
	}
	return result;
}

/* What a single step answers. */
static int told(struct vu_queue *queue, const struct vu_chain *chain, enum vu_malformed fault)
{
	if (!fault)
		return chain->readables + chain->writables;
	if (is_miss(queue, fault))
		return VU_RING_MISS;
	queue->malformed[fault]++;
	return VU_RING_MALFORMED;
}

static int take(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
		struct vu_descriptor *ring)
{
	enum vu_malformed fault = VU_MALFORMED_NONE;
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	if (!result)
		result = take_next(queue, memory, &areas, chain, ring, &fault);
	return result > 0 ? told(queue, chain, fault) : result;
}

static int reload(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain, uint32_t head)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	return result ? result : told(queue, chain, reload_split(queue, memory, chain, head));
}

static int rebuild(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
		   const struct vu_descriptor *ring, uint32_t count)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	return result ? result : told(queue, chain, rebuild_packed(queue, memory, chain, ring, count));
}

static int push(struct vu_queue *queue, const struct vu_memory *memory, uint32_t id, uint32_t slots, uint64_t written)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	/* Of 4 GiB the last byte can't be told; less than was written may be. */
	if (!result)
		give_back(queue, &areas, id, slots, written > UINT32_MAX ? UINT32_MAX : written);
	return result;
}

static int should_notify(struct vu_queue *queue, const struct vu_memory *memory)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	if (result || !queue->pending)
		return result;
	/* The driver asks for notifications, then looks for used chains; here it is the other way round. */
	full_fence();
	result = format_of(queue)->wants_notification(queue, &areas);
	queue->pending = 0;
	return result;
}

static int disable_notifications(struct vu_queue *queue, const struct vu_memory *memory)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	if (!result)
		format_of(queue)->advise(queue, &areas, false);
	return result;
}

static int enable_notifications(struct vu_queue *queue, const struct vu_memory *memory)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	if (result)
		return result;
	format_of(queue)->advise(queue, &areas, true);
	/* The driver makes chains available, then looks whether to notify; here it is the other way round. */
	full_fence();
	return format_of(queue)->available(queue, &areas);
}

int no_memory(struct vu_queue *queue)
{
	return break_ring(queue, VU_BROKEN_NO_MEMORY, 0);
}

int vu_queue_pop(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain)
{
	return GUARDED(int, pop(queue, memory, chain), no_memory(queue));
}

int vu_queue_take(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
		  struct vu_descriptor *ring)
{
	return GUARDED(int, take(queue, memory, chain, ring), no_memory(queue));
}

int vu_queue_reload(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain, uint32_t head)
{
	return GUARDED(int, reload(queue, memory, chain, head), no_memory(queue));
}

int vu_queue_rebuild(struct vu_queue *queue, const struct vu_memory *memory, struct vu_chain *chain,
		     const struct vu_descriptor *ring, uint32_t count)
{
	return GUARDED(int, rebuild(queue, memory, chain, ring, count), no_memory(queue));
}

int vu_queue_push(struct vu_queue *queue, const struct vu_memory *memory, uint32_t id, uint32_t slots,
		  uint64_t written)
{
	return GUARDED(int, push(queue, memory, id, slots, written), no_memory(queue));
}

int vu_queue_should_notify(struct vu_queue *queue, const struct vu_memory *memory)
{
	return GUARDED(int, should_notify(queue, memory), no_memory(queue));
}

int vu_queue_disable_notifications(struct vu_queue *queue, const struct vu_memory *memory)
{
	return GUARDED(int, disable_notifications(queue, memory), no_memory(queue));
}

int vu_queue_enable_notifications(struct vu_queue *queue, const struct vu_memory *memory)
{
	return GUARDED(int, enable_notifications(queue, memory), no_memory(queue));
}

/* What is done with each piece of a chain: copy it, or only see whether it is still there. */
typedef int piece_action(const struct vu_memory *memory, uint64_t address, char *buffer, uint64_t length);

static int read_piece(const struct vu_memory *memory, uint64_t address, char *buffer, uint64_t length)
{
	return read_memory(memory, address, buffer, length);
}

static int write_piece(const struct vu_memory *memory, uint64_t address, char *buffer, uint64_t length)
{
	return write_memory(memory, address, buffer, length);
}

static int check_piece(const struct vu_memory *memory, uint64_t address, char *buffer, uint64_t length)
{
	(void)buffer;
	return vu_memory_covers(memory, address, length, VU_WRITE) ? 0 : -EFAULT;
}

static int each_piece(const struct vu_memory *memory, const struct vu_segment *segment, uint64_t offset, char *buffer,
		      uint64_t length, piece_action *action)
{
	int result = 0;

	while (length && offset >= segment->length)
		offset -= segment++->length;
	for (; length && !result; segment++, offset = 0) {
		uint64_t here = segment->length - offset;

		if (here > length)
			here = length;
		result = action(memory, segment->address + offset, buffer, here);
		buffer += here;
		length -= here;
	}
	return result;
}

/* Out of line, so that no variable of theirs lives in the function that a fault returns to. */
__attribute__((noinline)) int read_chain(const struct vu_memory *memory, const struct vu_chain *from, uint64_t offset,
					 char *to, uint64_t length)
{
	return each_piece(memory, from->segments, offset, to, length, read_piece);
}

__attribute__((noinline)) int write_chain(const struct vu_memory *memory, const struct vu_chain *to, uint64_t offset,
					  char *from, uint64_t length)
{
	const struct vu_segment *first = to->segments + to->readables;
	int result = each_piece(memory, first, offset, from, length, check_piece);

	return result ? result : each_piece(memory, first, offset, from, length, write_piece);
}

int vu_chain_read(const struct vu_memory *memory, const void *chain, uint64_t offset, void *to, uint64_t length)
{
	return GUARDED(int, read_chain(memory, chain, offset, to, length), -EFAULT);
}

int vu_chain_write(const struct vu_memory *memory, const void *chain, uint64_t offset, const void *from,
		   uint64_t length)
{
	return GUARDED(int, write_chain(memory, chain, offset, (char *)from, length), -EFAULT);
}
