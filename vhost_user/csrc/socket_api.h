/*
 * Whole messages over a stream socket, with the descriptors that ride on them. No call ever reads beyond the message
 * that it is in, so what comes with its first byte is that message's. None depends on O_NONBLOCK, which belongs to the
 * peer as well where it made the socket.
 */

enum { VU_MOST_FDS = 8, VU_HEADER_SIZE = 12, VU_ANSWER_SIZE = 20 };

/*
 * A message as far as it has come. Zeros at first, but for the two limits: no message brings more than `most_fds`
 * descriptors, VU_MOST_FDS at most, or has a payload of more than `largest` bytes, for which there is room.
 *
 * `have` is how many of its bytes have come, and 0 when it is whole. While it is more, the descriptors are still owned
 * by this.
 *
 * A request that always has the same answer may be answered where it is read: `question`, by the `answer_size` bytes of
 * header and payload in `answer`. None is where that is 0.
 */
struct vu_incoming {
	uint32_t request, flags, size; /* the header, as it came */
	uint32_t fd_count;
	int fds[VU_MOST_FDS];
	uint32_t have, most_fds, largest;
	uint32_t question, answer_size;
	char answer[VU_ANSWER_SIZE];
	char payload[];
};

enum vu_received {
	VU_NOT_YET,	  /* the rest is still to come */
	VU_WHOLE,	  /* header, payload and descriptors are the caller's */
	VU_ENDED,	  /* the peer has closed its end */
	VU_BAD_HEADER,	  /* another version than 1, or more payload than there may be */
	VU_LATE_FDS,	  /* `fd_count` descriptors came behind the first byte */
	VU_TRUNCATED_FDS, /* more than `fd_count` descriptors came: too many, or more than this process may have */
	VU_WATCHED,	  /* one of the watched descriptors is ready */
	VU_ANSWERED,	  /* the question came, with nothing but a header, and has its answer */
};

/*
 * Takes what has come, and what comes within `patience` nanoseconds of looking again and again: who is about to send is
 * met awake then, and has nobody to wake. `others` may be an epoll that watches the socket, among others: then to look
 * ends with the first of them that can be read. A value of `enum vu_received`, or a negated errno. After any but
 * VU_NOT_YET, VU_WHOLE and VU_ANSWERED the stream can't be read on.
 */
int vu_receive(int sock, struct vu_incoming *incoming, int64_t patience, int others);

/*
 * The same, and then waiting for what is VU_NOT_YET until `deadline`, in nanoseconds of CLOCK_MONOTONIC, or until one of the
 * `count` descriptors at `watched` can be read or is broken.
 */
int vu_await(int sock, struct vu_incoming *incoming, const int *watched, size_t count, int64_t deadline,
	     int64_t patience);

/* Whether something can be read now, or is broken: of an epoll, whether one of those that it watches is ready. */
int vu_can_be_read(int fd);

/* Closes what a message brought that is not whole, and forgets it. */
void vu_incoming_drop(struct vu_incoming *incoming);

/* Sends as much of `data` as can be without waiting, the descriptors with its first byte: how much, or a negated errno. */
int64_t vu_send(int sock, const char *data, size_t size, const int *fds, size_t fd_count);
