/*
 * Two processes mark every second page each of one dirty log, from its beginning and at the same time, so that they are
 * in the same byte most of the time. Prints in how many bytes a bit was lost.
 */

#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "log_api.h"

enum { BYTES = 64, PAGES = 8 * BYTES, SHARED = 4096 };

/* What the processes share: the log, and how far each of them is, in a cache line of its own. */
struct shared {
	volatile uint8_t log[BYTES];
	struct {
		_Atomic long times;
		char rest[64 - sizeof(long)];
	} at[2];
};

static void meet(struct shared *shared, int me, long times)
{
	shared->at[me].times = times;
	for (long spins = 1; shared->at[!me].times < times; spins++)
		if (spins % 4096 == 0)
			sched_yield();
}

int main(int count, char **arguments)
{
	long rounds = count > 1 ? atol(arguments[1]) : 1, lost = 0;
	struct shared *shared = mmap(NULL, SHARED, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t child;
	int me, status;

	if (shared == MAP_FAILED || (child = fork()) < 0)
		return 1;
	me = child == 0;
	for (long round = 0; round < rounds; round++) {
		meet(shared, me, 2 * round + 1);
		for (int page = me; page < PAGES; page += 2)
			if (vu_log_mark((uintptr_t)shared->log, page, 1))
				return 1;
		meet(shared, me, 2 * round + 2);
		for (int byte = 0; !me && byte < BYTES; byte++) {
			lost += shared->log[byte] != 0xff;
			shared->log[byte] = 0;
		}
	}
	if (me)
		return 0;
	if (waitpid(child, &status, 0) != child || status)
		return 1;
	printf("%ld\n", lost);
	return 0;
}
