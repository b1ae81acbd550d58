/*
 * Requests that are answered while the ring is in hand; see at_once_api.h.
 *
 * Those are what changes nothing, and a PLUG where the host has nothing to do. That one is put on record and carried out
 * as serve/device.py does it, in the order that serve/intent.py says; but since the host has nothing to do, the record
 * says at once that it is granted.
 */

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>

#include "rules_api.h"
#include "at_once_api.h"

enum { RECORDED_PLUG = 1 };

/* One store, behind all before it and ahead of all after it: the process may be killed, but not the machine. */
static void store(uint64_t *word, uint64_t value)
{
	atomic_signal_fence(memory_order_seq_cst);
	*(volatile uint64_t *)word = value;
	atomic_signal_fence(memory_order_seq_cst);
}

/* Sets the bits of some blocks. */
static void set(uint8_t *blocks, uint64_t first, uint64_t nb_blocks)
{
	uint64_t end = first + nb_blocks;

	for (; first < end && first % 8; first++)
		blocks[first / 8] |= 1 << first % 8;
	if (first < end) {
		memset(blocks + first / 8, 0xff, (end - first) / 8);
		for (first = end - end % 8; first < end; first++)
			blocks[first / 8] |= 1 << first % 8;
	}
}

/* Whether the file has the blocks: its owner can truncate it at any time. */
static bool there(const struct vm_device *device, const struct vm_effect *effect)
{
	uint64_t end = (effect->first + effect->nb_blocks) * device->state.block_size;
	struct stat file;

	if (fstat(device->fd, &file) || end > (uint64_t)file.st_size)
		return false;
	return device->offset <= (uint64_t)file.st_size - end;
}

static void put_on_record(struct vm_record *record, const struct vm_effect *effect, const void *keys,
			  const void *requests, uint32_t count)
{
	store(&record->phase, VM_PHASE_NONE);
	record->effect = RECORDED_PLUG;
	record->first = effect->first;
	record->nb_blocks = effect->nb_blocks;
	memcpy(record->keys, keys, sizeof(*record->keys) * count);
	memcpy(record->requests, requests, sizeof(*record->requests) * count);
	record->count = count;
	store(&record->phase, VM_PHASE_GRANTED);
}

static void plug(struct vm_device *device, const struct vm_effect *effect)
{
	set(device->state.blocks, effect->first, effect->nb_blocks);
	device->state.plugged_size += effect->nb_blocks * device->state.block_size;
	device->plugged += effect->nb_blocks;
}

/* How many of the first `decided` change nothing, and leave no notice owed: a driver that was told BUSY gets one later. */
static uint32_t questions(const char *verdicts, uint32_t decided)
{
	uint32_t at = 0;

	while (at < decided && (verdicts[at] & 15) > VM_PAUSED)
		at++;
	return at;
}

uint32_t vm_answer(void *context, const void *keys, const void *requests, uint32_t count, void *answers)
{
	struct vm_device *device = context;
	struct vm_effect effect;
	uint32_t answered;

	if (!device->answers)
		return 0;
	/* What was granted before, since the caller prepared the device, has gone back. */
	if (device->plugged)
		store(&device->record->phase, VM_PHASE_NONE);
	answered = vm_decide(&device->state, requests, count < VM_MOST_CHAINS ? count : VM_MOST_CHAINS,
			     device->verdicts, answers, &effect);
	if (!effect.nb_blocks) {
		answered = questions(device->verdicts, answered);
	} else if (effect.type == VM_PLUG && device->record && there(device, &effect)) {
		put_on_record(device->record, &effect, keys, requests, answered);
		plug(device, &effect);
	} else {
		answered = 0;
	}
	device->answered = answered;
	for (uint32_t at = 0; at < answered && !device->looks; at++)
		device->counts[(uint8_t)device->verdicts[at]]++;
	return answered;
}
