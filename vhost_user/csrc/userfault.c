/* Page faults that somebody else answers; see userfault_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "userfault_api.h"

int vu_userfault_open(void)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS,
	};
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (uffd < 0 && errno == EPERM)
		uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (uffd < 0)
		return -errno;
	if (ioctl(uffd, UFFDIO_API, &api)) {
		int error = errno;

		close(uffd);
		return -error;
	}
	return uffd;
}

int vu_userfault_register(int uffd, uintptr_t address, uint64_t size)
{
	struct uffdio_register range = {
		.range = { .start = address, .len = size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	return ioctl(uffd, UFFDIO_REGISTER, &range) ? -errno : 0;
}

int vu_userfault_unregister(int uffd, uintptr_t address, uint64_t size)
{
	struct uffdio_range range = { .start = address, .len = size };

	return ioctl(uffd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}
