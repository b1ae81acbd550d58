/*
 * Closes a descriptor that a peer sent, and does not wait for what the last close of it waits for: a socket sends what it
 * has first where SO_LINGER says so, socket(7). (A file system in user space is asked at each close, fuse(4).) -EBADF where
 * it is none, else 0.
 */
int vu_close_received(int fd);
