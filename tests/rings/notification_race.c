/*
 * A driver and a device on two processors, each of which goes to sleep just when the other one has something for it.
 * They meet before every race, so that both stores and both looks fall into the same few nanoseconds: a store that is
 * still on its way when the look behind it is done is what a full barrier prevents. The device's side is the C core's;
 * the driver's is here, with its barriers, in the manner of a guest that is not written in Python.
 *
 * Prints: rounds in which both slept, and rounds in which both noticed; first for kicks, then for interrupts.
 */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

#include "memory.h"
#include "ring_api.h"

enum { SIZE = 16, DESC = 0, AVAIL = 512, USED = 1024, BUFFER = 2048, END = 4096 };

static char *memory;
static long rounds;
static _Atomic long arrived[2];
static _Atomic int driver_notices; /* told by a race's driver, read by the device after it */

/* Both wait here for each other, then linger for a moment that differs each time, of up to `longest` steps. */
static void meet(int me, long *times, unsigned int *seed, int longest)
{
	atomic_store(&arrived[me], ++*times);
	for (long spins = 1; atomic_load(&arrived[!me]) < *times; spins++)
		if (spins % 4096 == 0)
			sched_yield();
	for (volatile int linger = rand_r(seed) % longest; linger > 0; linger--)
		;
}

static void *drive(void *unused)
{
	unsigned int seed = 1;
	uint16_t idx = 0;
	long times = 0;

	for (long round = 0; round < rounds; round++) {
		meet(0, &times, &seed, 40);
		store16(memory + AVAIL + 4 + 2 * (idx % SIZE), 0);
		store16(memory + AVAIL + 2, idx + 1);
		full_fence();
		driver_notices = load16(memory + USED + 4 + 8 * SIZE) == idx;
		meet(0, &times, &seed, 1);

		meet(0, &times, &seed, 80);
		store16(memory + AVAIL + 4 + 2 * SIZE, idx);
		full_fence();
		driver_notices = load16(memory + USED + 2) != idx;
		meet(0, &times, &seed, 1);
		idx++;
	}
	return unused;
}

int main(int argc, char **argv)
{
	struct vu_memory *table = calloc(1, sizeof(*table) + sizeof(table->regions[0]));
	struct vu_chain *chain = calloc(1, sizeof(*chain) + SIZE * sizeof(chain->segments[0]));
	struct vu_queue queue = {
		.desc = { DESC, 16 * SIZE, 16 },
		.driver = { AVAIL, 6 + 2 * SIZE, 2 },
		.device = { USED, 6 + 8 * SIZE, 4 },
		.size = SIZE,
		.event_idx = 1,
	};
	long times = 0, no_kick = 0, both_kick = 0, no_interrupt = 0, both_interrupt = 0;
	unsigned int seed = 2;
	pthread_t driver;

	rounds = argc > 1 ? atol(argv[1]) : 0;
	memory = aligned_alloc(END, END);
	for (int at = 0; at < END; at++)
		memory[at] = 0;
	/* The one descriptor that every chain is made of: 8 bytes to read. */
	store32(memory + DESC, BUFFER);
	store32(memory + DESC + 8, 8);
	table->count = 1;
	table->regions[0] = (struct vu_region){ 0, END, (uintptr_t)memory };
	if (pthread_create(&driver, NULL, drive, NULL))
		return 1;
	for (long round = 0; round < rounds; round++) {
		int notices;

		meet(1, &times, &seed, 40);
		notices = vu_queue_enable_notifications(&queue, table);
		meet(1, &times, &seed, 1);
		no_kick += !notices && !driver_notices;
		both_kick += notices && driver_notices;
		if (vu_queue_pop(&queue, table, chain) != 1)
			return 2;

		meet(1, &times, &seed, 40);
		vu_queue_push(&queue, table, chain->id, chain->slots, 0);
		notices = vu_queue_should_notify(&queue, table);
		meet(1, &times, &seed, 1);
		no_interrupt += !notices && !driver_notices;
		both_interrupt += notices && driver_notices;
	}
	pthread_join(driver, NULL);
	printf("%ld %ld %ld %ld\n", no_kick, both_kick, no_interrupt, both_interrupt);
	return 0;
}
