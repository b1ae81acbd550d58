/* Bytes over a unix socket, with a descriptor or without; what floor.c and peers.c are made of. */

#ifndef FD_MESSAGE_H
#define FD_MESSAGE_H

#include <err.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>

union fd_room {
	char room[CMSG_SPACE(sizeof(int))];
	struct cmsghdr align;
};

static inline void send_bytes(int sock, const void *data, size_t size, int fd)
{
	struct iovec part = { (void *)data, size };
	union fd_room control;
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	if (fd >= 0) {
		struct cmsghdr *header = &control.align;

		message.msg_control = control.room;
		message.msg_controllen = sizeof(control.room);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(fd));
		memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	}
	if (sendmsg(sock, &message, MSG_NOSIGNAL) != (ssize_t)size)
		err(1, "sendmsg");
}

/* The descriptor that came along, -1 without one; false at the end. */
static inline bool receive_bytes(int sock, void *data, size_t size, int *fd)
{
	struct iovec part = { data, size };
	union fd_room control;
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof(control.room)
	};

	if (recvmsg(sock, &message, MSG_WAITALL | MSG_CMSG_CLOEXEC) != (ssize_t)size)
		return false;
	*fd = -1;
	if (CMSG_FIRSTHDR(&message) != NULL)
		memcpy(fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(*fd));
	return true;
}

#endif
