/*
 * Closing what a peer sent; see close_api.h.
 *
 * A thread gets a table of descriptors of its own, so that the caller's close is not the last one. The thread then ends:
 * no process lingers as it exits, nor does a thread, and what waits all the same, waits there. Its other duplicates go
 * first, or what they stand for would stay open with it.
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
#include <time.h>
#include <unistd.h>

#include "close_api.h"
#include "detached.h"

/* UNSHARE is CLOSE_RANGE_UNSHARE of linux/close_range.h. A thread ends within some 50 us, if it doesn't wait. */
enum { UNSHARE = 2, LOOKS = 100, NS_BETWEEN_LOOKS = 20000 };

struct handover {
	int fd;
	pid_t thread;
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

/* Whether the calling thread has descriptors of its own now. Seccomp may allow only one of the two ways. */
static bool get_own_table(void)
{
	return !unshare(CLONE_FILES) || !syscall(SYS_close_range, ~0U, ~0U, UNSHARE);
}

static void *hold(void *argument)
{
	struct handover *handover = argument;
	unsigned int fd = handover->fd;
	bool own = get_own_table();

	handover->thread = syscall(SYS_gettid);
	sem_post(&handover->ready);
	await(&handover->closed);
	let_go(handover);
	if (own && fd)
		syscall(SYS_close_range, 0, fd - 1, 0);
	if (own)
		syscall(SYS_close_range, fd + 1, ~0U, 0);
	return NULL;
}

/* Waits for a thread to be gone, so that what it had is closed when the caller returns; but not for long. */
static void await_end(pid_t thread)
{
	struct timespec pause = { 0, NS_BETWEEN_LOOKS };

	for (int look = 0; look < LOOKS && !syscall(SYS_tgkill, getpid(), thread, 0); look++)
		nanosleep(&pause, NULL);
}

static void close_elsewhere(int fd)
{
	struct handover *handover = malloc(sizeof(*handover));
	pid_t thread;

	if (handover) {
		handover->fd = fd;
		atomic_init(&handover->owners, 2);
		sem_init(&handover->ready, 0, 0);
		sem_init(&handover->closed, 0, 0);
	}
	if (!handover || !start_detached(hold, handover)) {
		free(handover);
		close(fd);
		return;
	}
	await(&handover->ready);
	close(fd);
	thread = handover->thread;
	sem_post(&handover->closed);
	let_go(handover);
	await_end(thread);
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
