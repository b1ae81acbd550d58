/*
 * What a back end needs for postcopy: page faults of its own that somebody else answers; see userfaultfd(2). Each call
 * returns a value of zero or more, or a negated errno.
 */

/*
 * A userfaultfd of this process, closed at exec, that doesn't wait when it is read. Where the kernel's own faults may not
 * be watched (they take a privilege), it is for faults in user mode only.
 */
int vu_userfault_open(void);

/* Have whoever touches a page that is missing from a range wait for an answer through the userfaultfd, or no more. */
int vu_userfault_register(int uffd, uintptr_t address, uint64_t size);
int vu_userfault_unregister(int uffd, uintptr_t address, uint64_t size);
