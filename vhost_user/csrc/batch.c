/* Taking and giving back many chains in one call; see ring_batch_api.h. */

#include "awake.h"
#include "event_api.h"
#include "guard.h"
#include "inflight.h"
#include "ring_batch_api.h"

static uint32_t used_position(const struct vu_queue *queue, uint32_t slots_before)
{
	uint32_t slot = queue->next_used + slots_before;
	bool wrap = queue->used_wrap;

	if (!queue->packed)
		return slot & 0xffff;
	if (slot >= queue->size) {
		slot -= queue->size;
		wrap = !wrap;
	}
	return slot | (uint32_t)wrap << 15;
}

static struct vu_chain *chain_at(const struct vu_batch *batch, size_t place)
{
	return (struct vu_chain *)(batch->chains + place);
}

static size_t size_of(const struct vu_queue *queue, const struct vu_chain *chain)
{
	uint32_t segments = chain ? chain->readables + chain->writables : queue->size;

	return sizeof(struct vu_chain) + sizeof(struct vu_segment) * segments;
}

/* What a member is whose chain is well-formed; its request is there then. */
static enum vu_member look(const struct vu_memory *memory, struct vu_batch *batch, const struct vu_chain *chain,
			   uint8_t *request)
{
	int result;

	if (chain->readable < batch->request_size)
		return VU_MEMBER_TOO_SHORT;
	if (chain->writable < batch->answer_size)
		return VU_MEMBER_NO_ROOM;
	batch->copying = true;
	result = read_chain(memory, chain, 0, (char *)request, batch->request_size);
	batch->copying = false;
	return result ? VU_MEMBER_MEMORY_GONE : VU_MEMBER_ASKS;
}

/* The member is taken; its kind is known. */
static void count_member(struct vu_queue *queue, struct vu_batch *batch, const struct vu_chain *chain)
{
	batch->count++;
	batch->visited += chain->visited;
	batch->slots += chain->slots;
	batch->place += size_of(queue, chain);
}

/* Takes what there is, one after the other, so that whatever a fault ends is whole up to the last member. */
__attribute__((noinline)) static int take(struct vu_queue *queue, const struct vu_memory *memory,
					  struct vu_batch *batch, uint32_t most,
					  struct vu_inflight *inflight)
{
	/* Enough for short chains; only an ill-willed driver makes one call read more. */
	const uint32_t visits = 2 * queue->size + 4 * most;
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	while (!result && batch->count < most && batch->visited < visits &&
	       batch->place + size_of(queue, NULL) <= batch->room) {
		struct vu_chain *chain = (struct vu_chain *)(batch->chains + batch->place);
		enum vu_malformed fault = VU_MALFORMED_NONE;
		uint32_t member = batch->count;
		int taken = take_next(queue, memory, &areas, chain, inflight ? inflight->taken : NULL, &fault);

		if (taken <= 0)
			return taken;
		if (inflight)
			batch->entries[member] = note_taken(queue, inflight, chain);
		batch->places[member] = batch->place;
		batch->keys[member] = (struct vu_key){ chain->id, used_position(queue, batch->slots) };
		if (fault) {
			queue->malformed[fault]++;
			batch->kinds[member] = VU_MEMBER_MALFORMED;
		} else {
			batch->kinds[member] = look(memory, batch, chain, batch->requests + batch->request_size * member);
		}
		count_member(queue, batch, chain);
	}
	return result;
}

/* A fault: in the copy of a request it costs its driver that request. */
static bool goes_on(struct vu_batch *batch, uint32_t member)
{
	if (!batch->copying)
		return false;
	batch->copying = false;
	batch->kinds[member] = VU_MEMBER_MEMORY_GONE;
	return true;
}

enum { FAULT = 1 };

int vu_batch_take(struct vu_queue *queue, const struct vu_memory *memory, struct vu_batch *batch, uint32_t most,
		  struct vu_inflight *inflight)
{
	int result;

	batch->count = batch->given = batch->visited = batch->slots = batch->place = 0;
	batch->copying = false;
	while ((result = GUARDED(int, take(queue, memory, batch, most, inflight), FAULT)) == FAULT) {
		if (!goes_on(batch, batch->count)) {
			no_memory(queue);
			break;
		}
		count_member(queue, batch, chain_at(batch, batch->place));
	}
	/* What is wrong behind the last member is met again when that one is back. Without memory nothing is. */
	if (batch->count && queue->broken && queue->broken != VU_BROKEN_NO_MEMORY)
		queue->broken = VU_BROKEN_NOT;
	return batch->count ? (int)batch->count : result == FAULT ? VU_RING_BROKEN : result;
}

__attribute__((noinline)) static int give(struct vu_queue *queue, const struct vu_memory *memory,
					  struct vu_batch *batch, uint32_t end, struct vu_inflight *inflight)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	for (; !result && batch->given < end; batch->given++) {
		uint32_t member = batch->given, written = batch->answer_size;
		const struct vu_chain *chain = chain_at(batch, batch->places[member]);

		if (batch->kinds[member] == VU_MEMBER_ASKS) {
			batch->copying = true;
			if (write_chain(memory, chain, 0, (char *)batch->answers + written * member, written))
				batch->kinds[member] = VU_MEMBER_MEMORY_GONE;
			batch->copying = false;
		}
		if (batch->kinds[member] != VU_MEMBER_ASKS)
			written = 0;
		if (inflight)
			note_giving(queue, inflight, batch->entries[member]);
		give_back(queue, &areas, chain->id, chain->slots, written);
		if (inflight)
			note_given(queue, inflight, batch->entries[member]);
	}
	return result;
}

int vu_batch_give(struct vu_queue *queue, const struct vu_memory *memory, struct vu_batch *batch, uint32_t end,
		  struct vu_inflight *inflight)
{
	uint32_t first = batch->given;
	int result, empty = 0;

	batch->copying = false;
	while ((result = GUARDED(int, give(queue, memory, batch, end, inflight), FAULT)) == FAULT)
		if (!goes_on(batch, batch->given))
			return no_memory(queue);
	for (uint32_t member = first; member < batch->given; member++)
		empty += batch->kinds[member] != VU_MEMBER_ASKS;
	return result ? result : empty;
}

static int is_available(struct vu_queue *queue, const struct vu_memory *memory)
{
	struct areas areas;
	int result = find_areas(queue, memory, &areas);

	return result ? result : format_of(queue)->available(queue, &areas);
}

__attribute__((noinline)) static int is_available_guarded(struct vu_queue *queue, const struct vu_memory *memory)
{
	return GUARDED(int, is_available(queue, memory), no_memory(queue));
}

int vu_queue_await(struct vu_queue *queue, const struct vu_memory *memory, uint64_t nanoseconds)
{
	int64_t end = now() + (int64_t)nanoseconds;
	int result;

	do {
		relax();
		result = is_available_guarded(queue, memory);
	} while (!result && now() < end);
	return result;
}

static bool all_ask(const struct vu_batch *batch)
{
	for (uint32_t member = 0; member < batch->count; member++)
		if (batch->kinds[member] != VU_MEMBER_ASKS)
			return false;
	return true;
}

/* Answers members that have not gone back, as far as nobody else is needed for them, and gives them back. */
static int answer(struct vu_queue *queue, const struct vu_memory *memory, struct vu_batch *batch,
		  struct vu_inflight *inflight, struct vu_answerer *answerer)
{
	int result = 0;

	while (!result && batch->given < batch->count) {
		uint32_t first = batch->given;
		uint32_t answered = answerer->answer(answerer->device, batch->keys + first,
						     batch->requests + batch->request_size * first, batch->count - first,
						     batch->answers + batch->answer_size * first);

		if (!answered)
			break;
		answerer->answered += answered;
		result = vu_batch_give(queue, memory, batch, first + answered, inflight);
		answerer->lost = batch->given < first + answered;
		if (answerer->once)
			break;
	}
	return result;
}

/* Answers a batch: 1 if that was all of it, and the driver is called; 0 if the caller has to look, or a failure. */
static int answer_all(struct vu_queue *queue, const struct vu_memory *memory, struct vu_batch *batch,
		      struct vu_inflight *inflight, struct vu_answerer *answerer)
{
	int result = answer(queue, memory, batch, inflight, answerer);

	if (result)
		return result < 0 ? result : 0;
	if (batch->given < batch->count)
		return 0;
	result = vu_queue_should_notify(queue, memory);
	if (result < 0)
		return result;
	if (result && answerer->call >= 0)
		vu_event_signal(answerer->call);
	return 1;
}

/* How many members there is room for, `left` at most. */
static uint32_t most_of(const struct vu_batch *batch, uint32_t left)
{
	return left < batch->most ? left : batch->most;
}

int vu_batch_serve(struct vu_queue *queue, const struct vu_memory *memory, struct vu_batch *batch, uint32_t most,
		   struct vu_inflight *inflight, struct vu_answerer *answerer)
{
	int64_t end = now() + (int64_t)answerer->longest;

	answerer->answered = 0;
	answerer->lost = answerer->idle = false;
	while (answerer->answered < most && (!answerer->answered || now() < end)) {
		uint32_t left = most - answerer->answered;
		int result = vu_batch_take(queue, memory, batch, most_of(batch, left), inflight);

		/* Once: a driver that takes back what it has made available would be waited for again and again. */
		if (!result && answerer->patience) {
			result = vu_queue_await(queue, memory, answerer->patience);
			if (result > 0)
				result = vu_batch_take(queue, memory, batch, most_of(batch, left), inflight);
		}
		answerer->idle = !result;
		if (result <= 0)
			return result;
		if (!all_ask(batch))
			return batch->count;
		result = answer_all(queue, memory, batch, inflight, answerer);
		if (result <= 0)
			return result ? result : (int)batch->count;
		if (answerer->once)
			break;
	}
	return 0;
}
