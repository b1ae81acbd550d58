/* The rules of a virtio-mem device; see rules_api.h. No descriptor, no system call, no memory but what it is given. */

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "rules_api.h"

enum response_type { ACK, NACK, BUSY, ERROR };

enum { RESPONSE_SIZE = 10 };

/* A request, in host byte order. */
struct request {
	enum vm_request_type type;
	uint64_t addr;
	uint16_t nb_blocks;
};

/* Neighbouring blocks. */
struct run {
	uint64_t first, nb_blocks;
};

static struct request decode(const uint8_t *from)
{
	struct request request;
	uint16_t type, nb_blocks;
	uint64_t addr;

	memcpy(&type, from, sizeof(type));
	memcpy(&addr, from + 8, sizeof(addr));
	memcpy(&nb_blocks, from + 16, sizeof(nb_blocks));
	type = le16toh(type);
	request.type = type < VM_UNKNOWN ? type : VM_UNKNOWN;
	request.addr = le64toh(addr);
	request.nb_blocks = le16toh(nb_blocks);
	return request;
}

static void encode(uint8_t *to, enum response_type type, uint16_t state)
{
	uint16_t words[] = { htole16(type), 0, 0, 0, htole16(state) };

	memcpy(to, words, RESPONSE_SIZE);
}

/* The 64 blocks from block `at` on, a multiple of 64, block n in bit n; those from `end` on may be anything. */
static uint64_t word_at(const uint8_t *blocks, uint64_t at, uint64_t end)
{
	uint64_t word = 0, left = (end - at + 7) / 8;

	if (left >= sizeof(word))
		memcpy(&word, blocks + at / 8, sizeof(word));
	else
		memcpy(&word, blocks + at / 8, left);
	return le64toh(word);
}

/* The first block from `at` on that is as `plugged` says; `end` or one behind it if there is none before. */
static uint64_t find(const uint8_t *blocks, uint64_t at, uint64_t end, bool plugged)
{
	uint64_t flip = plugged ? 0 : UINT64_MAX, mask = UINT64_MAX << (at & 63);

	for (at -= at % 64; at < end; at += 64, mask = UINT64_MAX) {
		uint64_t word = (word_at(blocks, at, end) ^ flip) & mask;

		if (word) {
			at += __builtin_ctzll(word);
			break;
		}
	}
	return at;
}

/* Whether all blocks of a run are as `plugged` says. */
static bool all(const uint8_t *blocks, struct run run, bool plugged)
{
	uint64_t end = run.first + run.nb_blocks;

	return find(blocks, run.first, end, !plugged) >= end;
}

uint32_t vm_runs(const uint8_t *blocks, uint64_t at, uint64_t end, uint8_t plugged, uint64_t *firsts, uint64_t *sizes,
		 uint32_t room)
{
	uint32_t count = 0;

	while (count < room && (at = find(blocks, at, end, plugged)) < end) {
		firsts[count] = at;
		at = find(blocks, at, end, !plugged);
		sizes[count] = (at < end ? at : end) - firsts[count];
		count++;
	}
	return count;
}

/* `run` is what a request names; why it may not name that is a verdict other than VM_GRANTED. */
static enum vm_verdict find_run(const struct vm_state *state, const struct request *request, struct run *run)
{
	/* The block size is a power of two. For an address below the region the difference wraps, and is not used. */
	unsigned int shift = __builtin_ctzll(state->block_size);
	uint64_t usable = state->usable_region_size >> shift;
	uint64_t offset = request->addr - state->addr;

	*run = (struct run){ offset >> shift, request->nb_blocks };
	if (offset & (state->block_size - 1))
		return VM_UNALIGNED;
	if (!request->nb_blocks)
		return VM_NO_BLOCKS;
	if (request->addr < state->addr || run->nb_blocks > usable || run->first > usable - run->nb_blocks)
		return VM_OUTSIDE;
	return VM_GRANTED;
}

static enum vm_verdict decide_state(const struct vm_state *state, struct run run)
{
	if (all(state->blocks, run, true))
		return VM_STATE_PLUGGED;
	return all(state->blocks, run, false) ? VM_STATE_UNPLUGGED : VM_STATE_MIXED;
}

/* What becomes of a PLUG, where `pending` bytes more are plugged than the state says, or of an UNPLUG. */
static enum vm_verdict decide_change(const struct vm_state *state, bool plug, struct run run, uint64_t pending)
{
	uint64_t size = run.nb_blocks * state->block_size;

	if (!all(state->blocks, run, !plug))
		return plug ? VM_PLUGGED_ALREADY : VM_UNPLUGGED_ALREADY;
	/* A region holds the sum, since none of these blocks is plugged. */
	if (plug && state->plugged_size + pending + size > state->requested_size)
		return VM_BEYOND_TARGET;
	return state->paused ? VM_PAUSED : VM_GRANTED;
}

static enum vm_verdict decide(const struct vm_state *state, const struct request *request, struct run *run)
{
	enum vm_verdict named = find_run(state, request, run);

	switch (request->type) {
	case VM_PLUG:
	case VM_UNPLUG:
		return named == VM_GRANTED ? decide_change(state, request->type == VM_PLUG, *run, 0) : named;
	case VM_STATE:
		return named == VM_GRANTED ? decide_state(state, *run) : named;
	case VM_UNPLUG_ALL:
		*run = (struct run){ 0, state->region_size / state->block_size };
		return state->paused ? VM_PAUSED : VM_GRANTED;
	default:
		return VM_UNKNOWN_TYPE;
	}
}

static bool adjoins(const struct vm_effect *effect, struct run run)
{
	return run.first == effect->first + effect->nb_blocks || run.first + run.nb_blocks == effect->first;
}

/* Whether a request would be granted after those whose effect this is, and only makes the run longer. */
static bool extends(const struct vm_state *state, const struct vm_effect *effect, const struct request *request,
		    struct run *run)
{
	/* Nothing lies beside an UNPLUG ALL. */
	if (request->type != effect->type)
		return false;
	if (find_run(state, request, run) != VM_GRANTED || !adjoins(effect, *run))
		return false;
	return decide_change(state, request->type == VM_PLUG, *run, effect->nb_blocks * state->block_size) == VM_GRANTED;
}

static void answer(enum vm_verdict verdict, uint8_t *to)
{
	switch (verdict) {
	case VM_GRANTED:
		encode(to, ACK, 0);
		break;
	case VM_PAUSED:
		encode(to, BUSY, 0);
		break;
	case VM_STATE_PLUGGED:
	case VM_STATE_UNPLUGGED:
	case VM_STATE_MIXED:
		encode(to, ACK, verdict - VM_STATE_PLUGGED);
		break;
	case VM_BEYOND_TARGET:
		encode(to, NACK, 0);
		break;
	default:
		encode(to, ERROR, 0);
	}
}

uint32_t vm_decide(const struct vm_state *state, const void *requests, uint32_t count, char *verdicts, void *answers,
		   struct vm_effect *effect)
{
	uint32_t at;

	effect->nb_blocks = 0;
	for (at = 0; at < count; at++) {
		struct request request = decode((const uint8_t *)requests + VM_REQUEST_SIZE * at);
		enum vm_verdict verdict = VM_GRANTED;
		struct run run;

		if (effect->nb_blocks) {
			if (!extends(state, effect, &request, &run))
				break;
			effect->first = run.first < effect->first ? run.first : effect->first;
			effect->nb_blocks += run.nb_blocks;
		} else {
			verdict = decide(state, &request, &run);
			/* What changes blocks is decided on when all before it is answered. */
			if (verdict == VM_GRANTED && at)
				break;
			if (verdict == VM_GRANTED)
				*effect = (struct vm_effect){ request.type, run.first, run.nb_blocks };
		}
		verdicts[at] = request.type << 4 | verdict;
		answer(verdict, (uint8_t *)answers + RESPONSE_SIZE * at);
	}
	return at;
}
