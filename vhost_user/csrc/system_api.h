/*
 * The system calls that Python lacks. Each returns a value of zero or more, or a negated errno.
 */

/* madvise(2). */
int vu_madvise(uintptr_t address, uint64_t length, int advice);

/* fallocate(2). */
int vu_fallocate(int fd, int mode, int64_t offset, int64_t length);

/* The size of a regular file, and that of the pages that a mapping of it has; -EINVAL for anything else than a file. */
int64_t vu_file_sizes(int fd, int64_t *page_size);

/* Have the kernel kill this process when its parent dies: PR_SET_PDEATHSIG of prctl(2). */
int vu_die_with_parent(void);

/* mbind(2) with a node mask of `words` unsigned longs. */
int vu_mbind(uintptr_t address, uint64_t length, int mode, const unsigned long *mask, unsigned long words);

/*
 * Bytes of private memory that the host holds for a range of this process: anonymous pages and private copies of
 * file pages, present or swapped. `pagemap` is an open /proc/self/pagemap. With `scan` the shared zero page is left out,
 * or -ENOTTY where the kernel is older than 6.7 and can't tell; without, it counts as held.
 */
int64_t vu_private_held(int pagemap, uintptr_t address, uint64_t length, int scan);

/*
 * Bytes of huge pages that a hugetlb file holds in a range, whoever touched them. hugetlbfs has no SEEK_DATA, so a
 * userfaultfd in minor mode is asked to map each page of a scratch mapping: it can only where a page exists.
 */
int64_t vu_hugetlb_held(int fd, int64_t offset, uint64_t length, uint64_t page_size);
