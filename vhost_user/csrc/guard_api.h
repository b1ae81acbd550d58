/*
 * Guest memory can be missing although it is mapped: the pool has no huge page, the file was truncated, its disk is
 * full. Touching it is then a SIGBUS. From the first call of this on, such a fault inside a call of the core makes that
 * call fail; a fault in a registered range is survived wherever it happens; any other is left to whoever would have
 * had it. Returns 0 or a negated errno.
 */
int vu_guard_install(void);

/*
 * Registers `size` bytes of this process at `address`, mapped in pages of `page_size`: whole pages of it, and a range
 * that overlaps none registered before, unless that one is unmapped by now. The first fault in it marks it dead. One
 * outside of the core also puts zeros in the place of its memory, private ones, and goes on.
 *
 * Returns the range's slot until it is removed, or -ENOSPC where VU_GUARD_SLOTS ranges are registered. Any thread may
 * call these at any time; a range is removed once, when nothing touches its memory any more.
 */
enum { VU_GUARD_SLOTS = 16384 };
int vu_guard_add(uintptr_t address, uint64_t size, uint64_t page_size);
void vu_guard_remove(int slot);

/* Whether the range was marked dead. */
int vu_guard_dead(int slot);

/* How many ranges of this process were marked dead so far: it is the same as before where none was since. */
uint64_t vu_guard_faults(void);

/* The size of the pages that a mapping of the file has: of its huge pages on a hugetlbfs. Or a negated errno. */
int64_t vu_page_size(int fd);
