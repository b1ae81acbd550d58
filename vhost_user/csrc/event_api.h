/*
 * Kicks and interrupts through descriptors that another process shares. Its flags are that process's too: it may make
 * the descriptor blocking at any moment, and fill or empty it, so neither call may rest on O_NONBLOCK. Each returns a
 * value of zero or more, or a negated errno.
 */

/*
 * Adds 1 to an eventfd(2), whatever its flags and its value: a full one stays full. The kernel does it on completion of
 * an asynchronous read (io_submit(2) with IOCB_FLAG_RESFD), because that is the one way from user space that can't
 * wait; where the host has no more of that to give, a thread writes. -EINVAL if `fd` is no eventfd.
 */
int vu_event_signal(int fd);

/* Takes what an eventfd or a pipe holds: 1 if there was something, 0 if not, -EPIPE at a pipe's end. */
int vu_event_take(int fd);
