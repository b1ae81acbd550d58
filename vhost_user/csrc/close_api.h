/*
 * Closes a descriptor, and does not wait for what closing it waits for: a socket sends what it has first where
 * SO_LINGER says so, socket(7), and a file system in user space is asked, fuse(4). A peer may have made it either.
 */
void vu_close_elsewhere(int fd);
