/*
 * Guest memory can be missing although it is mapped: the pool has no huge page, the file was truncated, its disk is
 * full. Touching it is then a SIGBUS. From the first call of this on, such a fault inside a call of the core makes that
 * call fail; any other is left to whoever would have had it. Returns 0 or a negated errno.
 */
int vu_guard_install(void);
