/* The system calls that Python lacks; see system_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guard_api.h"
#include "system_api.h"

int vu_madvise(uintptr_t address, uint64_t length, int advice)
{
	return madvise((void *)address, length, advice) ? -errno : 0;
}

int vu_fallocate(int fd, int mode, int64_t offset, int64_t length)
{
	return fallocate(fd, mode, offset, length) ? -errno : 0;
}

int64_t vu_file_sizes(int fd, int64_t *page_size)
{
	struct stat info;

	if (fstat(fd, &info))
		return -errno;
	if (!S_ISREG(info.st_mode))
		return -EINVAL;
	*page_size = vu_page_size(fd);
	return *page_size < 0 ? *page_size : info.st_size;
}

int vu_die_with_parent(void)
{
	return prctl(PR_SET_PDEATHSIG, SIGKILL) ? -errno : 0;
}

int vu_mbind(uintptr_t address, uint64_t length, int mode, const unsigned long *mask, unsigned long words)
{
	/* The kernel reads one bit less than `maxnode` says; see mbind(2). */
	unsigned long maxnode = words * 8 * sizeof(unsigned long) + 1;

	return syscall(SYS_mbind, address, length, mode, mask, maxnode, 0) ? -errno : 0;
}

/* PAGEMAP_SCAN came with Linux 6.7; older kernel headers don't have it. See Documentation/admin-guide/mm/pagemap.rst. */
struct scan_range {
	uint64_t start, end, categories;
};

struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)
#define PAGE_FILE (1 << 2)
#define PAGE_PRESENT (1 << 3)
#define PAGE_SWAPPED (1 << 4)
#define PAGE_PFNZERO (1 << 5)

static int64_t scan_held(int pagemap, uint64_t start, uint64_t end)
{
	struct scan_range found[256];
	int64_t held = 0;

	while (start < end) {
		struct scan_arg arg = {
			.size = sizeof(arg),
			.start = start,
			.end = end,
			.vec = (uintptr_t)found,
			.vec_len = sizeof(found) / sizeof(found[0]),
			.category_inverted = PAGE_FILE | PAGE_PFNZERO,
			.category_mask = PAGE_FILE | PAGE_PFNZERO,
			.category_anyof_mask = PAGE_PRESENT | PAGE_SWAPPED,
			.return_mask = PAGE_PRESENT | PAGE_SWAPPED,
		};
		int count = ioctl(pagemap, SCAN_IOCTL, &arg);

		if (count < 0)
			return -errno;
		for (int i = 0; i < count; i++)
			held += found[i].end - found[i].start;
		if (arg.walk_end <= start)
			break;
		start = arg.walk_end;
	}
	return held;
}

/* Before Linux 6.7: bit 63 present, bit 62 swapped, bit 61 file page. The zero page can't be told apart. */
static int64_t read_held(int pagemap, uint64_t start, uint64_t end)
{
	uint64_t entry[512], page = sysconf(_SC_PAGESIZE);
	int64_t held = 0;

	while (start < end) {
		uint64_t pages = (end - start) / page;
		size_t want = (pages < 512 ? pages : 512) * sizeof(entry[0]);
		ssize_t got = pread(pagemap, entry, want, start / page * sizeof(entry[0]));

		if (got < 0)
			return -errno;
		if (got < (ssize_t)sizeof(entry[0]))
			return -EIO;
		for (size_t i = 0; i < got / sizeof(entry[0]); i++)
			if (entry[i] >> 62 & 1 || (entry[i] >> 63 & 1 && !(entry[i] >> 61 & 1)))
				held += page;
		start += got / sizeof(entry[0]) * page;
	}
	return held;
}

int64_t vu_private_held(int pagemap, uintptr_t address, uint64_t length, int scan)
{
	return scan ? scan_held(pagemap, address, address + length) : read_held(pagemap, address, address + length);
}

/* A page that exists can be mapped, or is mapped already; a hole answers EFAULT. */
static int64_t count_mappable(int uffd, uint64_t start, uint64_t length, uint64_t page_size)
{
	int64_t held = 0;

	for (uint64_t page = start; page < start + length; page += page_size) {
		struct uffdio_continue map = {
			.range = { .start = page, .len = page_size },
			.mode = UFFDIO_CONTINUE_MODE_DONTWAKE,
		};

		if (ioctl(uffd, UFFDIO_CONTINUE, &map) == 0 || errno == EEXIST)
			held += page_size;
		else if (errno == EAGAIN)
			page -= page_size;
		else if (errno != EFAULT)
			return -errno;
	}
	return held;
}

int64_t vu_hugetlb_held(int fd, int64_t offset, uint64_t length, uint64_t page_size)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_MINOR_HUGETLBFS };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MINOR };
	int64_t held;
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	void *scratch;

	if (uffd < 0)
		return -errno;
	if (ioctl(uffd, UFFDIO_API, &api)) {
		held = -errno;
		goto close_uffd;
	}
	scratch = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, offset);
	if (scratch == MAP_FAILED) {
		held = -errno;
		goto close_uffd;
	}
	reg.range.start = (uintptr_t)scratch;
	reg.range.len = length;
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		held = -errno;
	else
		held = count_mappable(uffd, (uintptr_t)scratch, length, page_size);
	munmap(scratch, length);
close_uffd:
	close(uffd);
	return held;
}
