/*
 * Closes a descriptor that a peer sent, and does not wait for what closing it waits for: a socket sends what it has
 * first where SO_LINGER says so, socket(7), and a file system in user space is asked, fuse(4). -EBADF where
 * it is none, else 0.
 */
int vu_close_received(int fd);
