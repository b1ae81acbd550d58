/*
 * The dirty log of a migration: one bit for each page of guest memory. dirty_log.py has the theory.
 */

/*
 * Sets the bits of `count` pages from page `first` on in the log at `log`, all of which it covers. Each byte is changed
 * by an atomic OR with release order: who sees a bit sees what was written to its page before this call. Returns 0, or
 * -EFAULT where the host has no memory behind the log.
 */
int vu_log_mark(uintptr_t log, uint64_t first, uint64_t count);
