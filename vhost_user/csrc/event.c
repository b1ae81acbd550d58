/* Kicks and interrupts that no peer can hold up; see event_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "detached.h"
#include "event_api.h"

enum { NS_PER_S = 1000000000, PATIENCE = 20000000 };

/*
 * One for the process, made at the first signal and kept. The lock is held for two system calls that don't wait, and by
 * whoever forks: a child would have it taken for ever by a thread that it doesn't have.
 */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static aio_context_t context;
static int zero = -1;
static pid_t owner;

static void before_fork(void)
{
	pthread_mutex_lock(&lock);
}

static void in_parent(void)
{
	pthread_mutex_unlock(&lock);
}

/* The number of /dev/zero is another file's soon, where a child closes what it got; or is already, in such a child. */
static void in_child(void)
{
	zero = -1;
	pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void watch_forks(void)
{
	pthread_atfork(before_fork, in_parent, in_child);
}

/* A child has a copy of the context's number, but the context is the parent's. */
static int make_context(void)
{
	if (context && zero >= 0 && owner == getpid())
		return 0;
	context = 0;
	if (zero < 0)
		zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	if (zero < 0 || syscall(SYS_io_setup, 1, &context))
		return -errno;
	owner = getpid();
	return 0;
}

/* 1 if the kernel signalled, 0 where it has no context for us; or a negated errno, -EINVAL for what is no eventfd. */
static int signal_by_kernel(int fd)
{
	char byte;
	struct iocb read_zero = {
		.aio_lio_opcode = IOCB_CMD_PREAD,
		.aio_buf = (uintptr_t)&byte,
		.aio_nbytes = 1,
		.aio_flags = IOCB_FLAG_RESFD,
		.aio_resfd = fd,
	};
	struct iocb *submitted = &read_zero;
	struct io_event done;

	if (make_context())
		return 0;
	read_zero.aio_fildes = zero;
	if (syscall(SYS_io_submit, context, 1, &submitted) != 1)
		return errno == EAGAIN || errno == ENOMEM ? 0 : -errno;
	while (syscall(SYS_io_getevents, context, 1, 1, &done, NULL) < 0 && errno == EINTR)
		continue;
	return 1;
}

/* What is left where no thread can be had: to write as if the flag were ours alone. */
static int write_here(int fd)
{
	uint64_t one = 1;
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || (!(flags & O_NONBLOCK) && fcntl(fd, F_SETFL, flags | O_NONBLOCK)))
		return -errno;
	return write(fd, &one, sizeof(one)) == sizeof(one) || errno == EAGAIN ? 0 : -errno;
}

/* A write to `fd`, a duplicate of an eventfd, which may take as long as its owners like. */
struct writing {
	int fd;
	sem_t done;
	atomic_int owners;
};

static void let_go(struct writing *writing)
{
	if (atomic_fetch_sub(&writing->owners, 1) == 1)
		free(writing);
}

static void *write_one(void *argument)
{
	struct writing *writing = argument;
	uint64_t one = 1;

	while (write(writing->fd, &one, sizeof(one)) < 0 && errno == EINTR)
		continue;
	close(writing->fd);
	sem_post(&writing->done);
	let_go(writing);
	return NULL;
}

/* Waits for it, but not for long: this process may be about to end. */
static void await(struct writing *writing)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += PATIENCE;
	if (until.tv_nsec >= NS_PER_S) {
		until.tv_sec++;
		until.tv_nsec -= NS_PER_S;
	}
	while (sem_clockwait(&writing->done, CLOCK_MONOTONIC, &until) && errno == EINTR)
		continue;
}

/*
 * The host has no asynchronous I/O left to give: a call must not be lost for that. Whoever is full has been called; and
 * who fills it meanwhile holds a thread, which nobody waits for.
 */
static int signal_by_write(int fd)
{
	struct pollfd room = { fd, POLLOUT, 0 };
	struct writing *writing;

	if (poll(&room, 1, 0) == 0)
		return 0;
	writing = malloc(sizeof(*writing));
	if (!writing)
		return -ENOMEM;
	writing->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	sem_init(&writing->done, 0, 0);
	atomic_init(&writing->owners, 2);
	if (writing->fd >= 0 && start_detached(write_one, writing)) {
		await(writing);
		let_go(writing);
		return 0;
	}
	if (writing->fd >= 0)
		close(writing->fd);
	free(writing);
	return write_here(fd);
}

int vu_event_signal(int fd)
{
	int result;

	pthread_mutex_lock(&lock);
	result = signal_by_kernel(fd);
	pthread_mutex_unlock(&lock);
	if (result)
		return result < 0 ? result : 0;
	return signal_by_write(fd);
}

int vu_event_take(int fd)
{
	char rings[4096];
	struct iovec room = { rings, sizeof(rings) };
	ssize_t got = preadv2(fd, &room, 1, -1, RWF_NOWAIT);

	if (got > 0)
		return 1;
	if (got == 0)
		return -EPIPE;
	return errno == EAGAIN || errno == EINTR ? 0 : -errno;
}
