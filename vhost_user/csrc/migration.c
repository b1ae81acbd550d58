/* The dirty log and page faults from the front end's side; see migration_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include "guard.h"
#include "migration_api.h"

/* Out of line, so that no variable of its lives in the function that a fault returns to. */
__attribute__((noinline)) static int take(_Atomic uint64_t *log, uint64_t words, uint64_t *taken)
{
	for (uint64_t i = 0; i < words; i++) {
		/* Most words are 0, and a look alone leaves their cache lines to whoever has them. */
		taken[i] = atomic_load_explicit(&log[i], memory_order_relaxed);
		if (taken[i])
			taken[i] = atomic_exchange_explicit(&log[i], 0, memory_order_acquire);
	}
	return 0;
}

int vu_log_take(uintptr_t log, uint64_t words, uint64_t *taken)
{
	return GUARDED(int, take((_Atomic uint64_t *)log, words, taken), -EFAULT);
}

/* The flags of a descriptor that a peer has too are the peer's to change: only RWF_NOWAIT is sure not to wait. */
static ssize_t read_now(int fd, void *to, size_t size)
{
	struct iovec part = { .iov_base = to, .iov_len = size };
	ssize_t got = preadv2(fd, &part, 1, -1, RWF_NOWAIT);

	if (got < 0 && errno == EOPNOTSUPP)
		got = read(fd, to, size);
	return got;
}

int vu_fault_take(int uffd, uint64_t *address)
{
	struct uffd_msg message;
	ssize_t got = read_now(uffd, &message, sizeof(message));

	if (got < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (got != sizeof(message))
		return -EIO;
	if (message.event != UFFD_EVENT_PAGEFAULT)
		return -EPROTO;
	*address = message.arg.pagefault.address;
	return 1;
}

int vu_fault_fill(int uffd, uint64_t address, const void *page, uint64_t size)
{
	struct uffdio_copy copy = { .dst = address, .src = (uintptr_t)page, .len = size };
	struct uffdio_range range = { .start = address, .len = size };

	if (ioctl(uffd, UFFDIO_COPY, &copy) == 0)
		return 1;
	if (errno != EEXIST)
		return -errno;
	return ioctl(uffd, UFFDIO_WAKE, &range) ? -errno : 0;
}
