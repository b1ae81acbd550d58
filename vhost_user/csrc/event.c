/* Kicks and interrupts that no peer can hold up; see event_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "event_api.h"

/* One context for each thread: what is submitted is done when io_submit returns, so one place in its queue is enough. */
static _Thread_local aio_context_t context;
static _Thread_local int zero = -1;
static _Thread_local pid_t owner;

/* A forked child has a copy of the number, but neither the context nor a right to the parent's. */
static int make_context(void)
{
	if (context && owner == getpid())
		return 0;
	context = 0;
	if (zero < 0)
		zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	if (zero < 0 || syscall(SYS_io_setup, 1, &context))
		return -errno;
	owner = getpid();
	return 0;
}

int vu_event_signal(int fd)
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
	int result = make_context();

	if (result)
		return result;
	read_zero.aio_fildes = zero;
	if (syscall(SYS_io_submit, context, 1, &submitted) != 1)
		return -errno;
	while (syscall(SYS_io_getevents, context, 1, 1, &done, NULL) < 0 && errno == EINTR)
		continue;
	return 0;
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
