/*
 * Closing without waiting; see close_api.h.
 *
 * A thread with descriptors of its own has a duplicate, so that the caller's close is not the last one. The thread then
 * ends: no process lingers as it exits, nor does a thread, and what waits all the same, waits there. Its other
 * duplicates are closed at once, or what they stand for would stay open with it.
 */

#define _GNU_SOURCE
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "close_api.h"
#include "detached.h"

enum { UNSHARE = 2 /* CLOSE_RANGE_UNSHARE of linux/close_range.h */ };

struct handover {
	int fd;
	sem_t ready, closed;
	atomic_int owners;
};

static void let_go(struct handover *handover)
{
	if (atomic_fetch_sub(&handover->owners, 1) == 1)
		free(handover);
}

static void await(sem_t *semaphore)
{
	while (sem_wait(semaphore))
		;
}

/* Close the calling thread's descriptors from `first` to `last`; where `unshare` says so, they become its own before. */
static bool close_range_of(unsigned int first, unsigned int last, unsigned int unshare)
{
	return !syscall(SYS_close_range, first, last, unshare);
}

static void *hold(void *argument)
{
	struct handover *handover = argument;
	unsigned int fd = handover->fd;

	/* Seccomp may allow only one of the two. */
	if (close_range_of(fd + 1, ~0U, UNSHARE) || (!unshare(CLONE_FILES) && close_range_of(fd + 1, ~0U, 0)))
		if (fd)
			close_range_of(0, fd - 1, 0);
	sem_post(&handover->ready);
	await(&handover->closed);
	let_go(handover);
	return NULL;
}

void vu_close_elsewhere(int fd)
{
	struct handover *handover = malloc(sizeof(*handover));
	bool held;

	if (handover) {
		handover->fd = fd;
		atomic_init(&handover->owners, 2);
		sem_init(&handover->ready, 0, 0);
		sem_init(&handover->closed, 0, 0);
	}
	held = handover && start_detached(hold, handover);
	if (held)
		await(&handover->ready);
	close(fd);
	if (held) {
		sem_post(&handover->closed);
		let_go(handover);
	} else {
		free(handover);
	}
}
