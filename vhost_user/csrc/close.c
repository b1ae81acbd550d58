/*
 * Closing without waiting; see close_api.h.
 *
 * A thread with descriptors of its own has a duplicate, so that the caller's close is not the last one. The thread then
 * ends: no process lingers as it exits, nor does a thread, and what waits all the same, waits there. Its other
 * duplicates are closed at once, or what they stand for would stay open with it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static void close_elsewhere(int fd)
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

static bool begins_with(const char *text, size_t size, const char *start)
{
	return size >= strlen(start) && !memcmp(text, start, strlen(start));
}

/* Memory, an eventfd or a pipe: nothing is asked here that a file system has to answer. */
static bool closes_at_once(int fd)
{
	char path[32], target[32];
	ssize_t size;

	if (fcntl(fd, F_GET_SEALS) >= 0)
		return true;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	size = readlink(path, target, sizeof(target));
	return size > 0 && (begins_with(target, size, "anon_inode:[eventfd]") || begins_with(target, size, "pipe:["));
}

int vu_close_received(int fd)
{
	if (fcntl(fd, F_GETFD) < 0)
		return -errno;
	if (closes_at_once(fd))
		close(fd);
	else
		close_elsewhere(fd);
	return 0;
}
