/* Whole messages over a stream socket; see socket_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "awake.h"
#include "close_api.h"
#include "socket_api.h"

enum { VERSION_MASK = 3, VERSION = 1, NS_PER_S = 1000000000 };

/* How often a processor is left to others between two looks at a socket, each of which is a system call. */
enum { RELAXED = 10 };

/* SCM_MAX_FD of the kernel: more than it lets anybody send at once. */
enum { SENT_FDS = 253 };

/* SCM_PIDFD of Linux 6.5. */
enum { PIDFD = 4 };

_Static_assert(offsetof(struct vu_incoming, fd_count) == VU_HEADER_SIZE, "the header is read at once");

union fd_message {
	char room[CMSG_SPACE(SENT_FDS * sizeof(int))];
	struct cmsghdr align;
};

static void close_all(const int *fds, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		vu_close_received(fds[i]);
}

void vu_incoming_drop(struct vu_incoming *incoming)
{
	if (incoming->have)
		close_all(incoming->fds, incoming->fd_count);
	incoming->have = 0;
}

/* Nobody here asks for the sender's pidfd with each read, but who made the socket can (SO_PASSPIDFD), and keep an end. */
static void close_pidfd(const struct cmsghdr *control)
{
	int pidfd;

	if (control->cmsg_len < CMSG_LEN(sizeof(pidfd)))
		return;
	memcpy(&pidfd, CMSG_DATA(control), sizeof(pidfd));
	if (pidfd >= 0) /* or the errno that kept it from being made, negated */
		close(pidfd);
}

/* The descriptors that came with a read, in `fds`, which has room for as many as the control message had. */
static uint32_t descriptors(struct msghdr *message, int *fds)
{
	uint32_t count = 0;

	for (struct cmsghdr *each = CMSG_FIRSTHDR(message); each; each = CMSG_NXTHDR(message, each)) {
		size_t length = each->cmsg_len - CMSG_LEN(0);

		if (each->cmsg_level == SOL_SOCKET && each->cmsg_type == PIDFD)
			close_pidfd(each);
		if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS)
			continue;
		memcpy(fds + count, CMSG_DATA(each), length);
		count += length / sizeof(int);
	}
	return count;
}

/* Whether the descriptors of this read may be there; they are closed where not. */
static int take_descriptors(struct vu_incoming *incoming, struct msghdr *message)
{
	int fds[SENT_FDS];
	uint32_t count = descriptors(message, fds);
	bool late = count && incoming->have;

	if (!late && count <= incoming->most_fds && !(message->msg_flags & MSG_CTRUNC)) {
		if (count) {
			memcpy(incoming->fds, fds, count * sizeof(int));
			incoming->fd_count = count;
		}
		return VU_WHOLE;
	}
	close_all(fds, count);
	vu_incoming_drop(incoming);
	incoming->fd_count = late || count < incoming->most_fds ? count : incoming->most_fds;
	return late ? VU_LATE_FDS : VU_TRUNCATED_FDS;
}

/* Reads as much as one call gives of the `size` bytes of header or payload at `to`: VU_WHOLE if something came. */
static int take_bytes(int sock, struct vu_incoming *incoming, void *to, size_t size)
{
	union fd_message control;
	struct iovec part = { to, size };
	/* There is room for all that can come: what there is none for the kernel closes, and waits if it has to. */
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control.room,
		.msg_controllen = sizeof(control.room),
	};
	ssize_t got;
	int result;

	do
		got = recvmsg(sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return errno == EAGAIN ? VU_NOT_YET : -errno;
	result = take_descriptors(incoming, &message);
	if (result != VU_WHOLE)
		return result;
	incoming->have += got;
	return got ? VU_WHOLE : VU_ENDED;
}

static bool good_header(const struct vu_incoming *incoming)
{
	return (incoming->flags & VERSION_MASK) == VERSION && incoming->size <= incoming->largest;
}

static int receive_now(int sock, struct vu_incoming *incoming)
{
	if (!incoming->have)
		incoming->fd_count = 0;
	for (;;) {
		uint32_t have = incoming->have, at = have - VU_HEADER_SIZE;
		int result;

		if (have < VU_HEADER_SIZE) {
			char *to = (char *)&incoming->request + have;

			result = take_bytes(sock, incoming, to, VU_HEADER_SIZE - have);
		} else if (!good_header(incoming)) {
			vu_incoming_drop(incoming);
			return VU_BAD_HEADER;
		} else if (at < incoming->size) {
			result = take_bytes(sock, incoming, incoming->payload + at, incoming->size - at);
		} else {
			incoming->have = 0;
			return VU_WHOLE;
		}
		if (result != VU_WHOLE)
			return result;
	}
}

/* So few bytes are sent as a whole or not at all. What can't be answered at once is the caller's, like all else. */
static int answer(int sock, const struct vu_incoming *incoming)
{
	bool asked = incoming->request == incoming->question && incoming->flags == VERSION && !incoming->size &&
		     !incoming->fd_count;

	if (!incoming->answer_size || !asked)
		return VU_WHOLE;
	return vu_send(sock, incoming->answer, incoming->answer_size, NULL, 0) < 0 ? VU_WHOLE : VU_ANSWERED;
}

int vu_can_be_read(int fd)
{
	struct pollfd one = { .fd = fd, .events = POLLIN };

	return poll(&one, 1, 0) > 0;
}

int vu_receive(int sock, struct vu_incoming *incoming, int64_t patience, int others)
{
	int result = receive_now(sock, incoming);
	int64_t end = patience > 0 ? now() + patience : 0;
	bool ready = false;

	while (result == VU_NOT_YET && !ready && now() < end) {
		/* Who is to send may need this very processor, or what its other thread has of it. */
		for (int i = 0; i < RELAXED; i++)
			relax();
		sched_yield();
		ready = others >= 0 && vu_can_be_read(others);
		if (ready || others < 0)
			result = receive_now(sock, incoming);
	}
	return result == VU_WHOLE ? answer(sock, incoming) : result;
}

static struct timespec until(int64_t deadline)
{
	int64_t left = deadline - now();

	return left > 0 ? (struct timespec){ left / NS_PER_S, left % NS_PER_S } : (struct timespec){ 0, 0 };
}

/* VU_NOT_YET when time is up, VU_WATCHED, VU_WHOLE where the socket alone has something, or a negated errno. */
static int wait_for(int sock, const int *watched, size_t count, int64_t deadline)
{
	struct pollfd *waits = calloc(1 + count, sizeof(*waits));
	struct timespec left = until(deadline);
	int ready, result = VU_WATCHED;

	if (!waits)
		return -ENOMEM;
	waits[0] = (struct pollfd){ .fd = sock, .events = POLLIN };
	for (size_t i = 0; i < count; i++)
		waits[1 + i] = (struct pollfd){ .fd = watched[i], .events = POLLIN };
	ready = ppoll(waits, 1 + count, &left, NULL);
	if (ready < 0)
		result = -errno;
	else if (!ready)
		result = VU_NOT_YET;
	else if (ready == 1 && waits[0].revents)
		result = VU_WHOLE;
	free(waits);
	return result;
}

int vu_await(int sock, struct vu_incoming *incoming, const int *watched, size_t count, int64_t deadline,
	     int64_t patience)
{
	int result;

	for (;; patience = 0) {
		result = vu_receive(sock, incoming, patience, -1);
		if (result != VU_NOT_YET)
			return result;
		result = wait_for(sock, watched, count, deadline);
		if (result != VU_WHOLE)
			return result;
	}
}

int64_t vu_send(int sock, const char *data, size_t size, const int *fds, size_t fd_count)
{
	union fd_message control;
	struct iovec part = { (char *)data, size };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
	ssize_t sent;

	if (fd_count > SENT_FDS)
		return -EINVAL;
	if (fd_count) {
		struct cmsghdr *header = &control.align;

		message.msg_control = control.room;
		message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		memcpy(CMSG_DATA(header), fds, fd_count * sizeof(int));
	}
	do
		sent = sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent < 0 ? -errno : sent;
}
