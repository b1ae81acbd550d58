/*
 * What a front end needs to move a machine while it runs: to take pages out of a dirty log, and to answer the page
 * faults of its back ends. dirty_log.py and frontend/postcopy.py have the theory. Each returns a value of zero or more,
 * or a negated errno.
 */

/*
 * Takes all bits out of the `words` words of the log at `log`, which is aligned to 8 bytes, into `taken`. Each word is
 * exchanged for 0 with acquire order: who then reads a page sees what was written to it before its bit was set. -EFAULT
 * where the host has no memory behind the log.
 */
int vu_log_take(uintptr_t log, uint64_t words, uint64_t *taken);

/*
 * The next page fault that a userfaultfd has to tell of, at `*address` in the process that faulted: 1, or 0 where there
 * is none. Never waits. -EPROTO for an event of another kind, -EIO for something that is none.
 */
int vu_fault_take(int uffd, uint64_t *address);

/*
 * Puts a copy of the `size` bytes at `page` at `address` of the process that the userfaultfd is of, and wakes who waits
 * there: UFFDIO_COPY. 1, or 0 where there was a page already; then it only wakes. -EAGAIN where the process is changing
 * its mappings, -ENOENT where nothing is registered there any more, -ESRCH where the process is gone.
 */
int vu_fault_fill(int uffd, uint64_t address, const void *page, uint64_t size);
