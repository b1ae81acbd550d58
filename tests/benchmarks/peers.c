/*
 * The two sides of a vhost-user connection, with as little as they can have: what the messages about memory cost each of
 * ours is what is left when the other side is one of these.
 *
 *   peers back-end SOCK                        serve a front end: regions come and go, all else is acknowledged
 *   peers front-end SOCK FD OTHERS BYTES TIMES share OTHERS slots of BYTES each of the file, and then TIMES times the one
 *                                              behind them, which is taken back at once; either is acknowledged, and
 *                                              the first is confirmed by GET_FEATURES. Nanoseconds of each such round, as 64-bit words
 *
 * Descriptors are inherited. Whatever fails ends the program with a message.
 */

#define _GNU_SOURCE

#include <err.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fd_message.h"
#include "program.h"

enum request {
	GET_FEATURES = 1,
	SET_FEATURES = 2,
	SET_OWNER = 3,
	GET_PROTOCOL_FEATURES = 15,
	SET_PROTOCOL_FEATURES = 16,
	GET_MAX_MEM_SLOTS = 36,
	ADD_MEM_REG = 37,
	REM_MEM_REG = 38,
};

enum { VERSION = 1, REPLY = 1 << 2, NEED_REPLY = 1 << 3, SLOTS = 509, LARGEST = 64 };

#define FEATURES (UINT64_C(1) << 30 | UINT64_C(1) << 32) /* PROTOCOL_FEATURES, VERSION_1 */
#define PROTOCOL (UINT64_C(1) << 3 | UINT64_C(1) << 15)	 /* REPLY_ACK, CONFIGURE_MEM_SLOTS */
#define LOWEST (UINT64_C(4) << 30)

struct header {
	uint32_t request, flags, size;
};

struct region {
	uint64_t padding, guest, size, user, offset;
};

struct message {
	struct header header;
	union {
		uint64_t number;
		struct region region;
		char bytes[LARGEST];
	} __attribute__((packed)) payload;
} __attribute__((packed));

static void send_message(int sock, struct message *message, int fd)
{
	send_bytes(sock, message, sizeof(message->header) + message->header.size, fd);
}

/* The descriptor that came along, -1 without one; false at the end. */
static bool receive_message(int sock, struct message *message, int *fd)
{
	uint32_t size;

	if (!receive_bytes(sock, &message->header, sizeof(message->header), fd))
		return false;
	size = message->header.size;
	if (size > LARGEST)
		errx(1, "a payload of %u bytes", size);
	if (size > 0 && recv(sock, &message->payload, size, MSG_WAITALL) != size)
		err(1, "recv");
	return true;
}

static void answer(int sock, const struct message *question, uint64_t number)
{
	struct message reply = { { question->header.request, VERSION | REPLY, sizeof(number) }, { .number = number } };

	send_message(sock, &reply, -1);
}

/* A back end. */

struct slot {
	uint64_t guest, size;
	void *memory;
};

static void add(struct slot *slots, const struct region *region, int fd)
{
	struct slot *slot = slots;

	while (slot < slots + SLOTS && slot->memory != NULL)
		slot++;
	if (slot == slots + SLOTS)
		errx(1, "more than %d slots", SLOTS);
	slot->memory = mmap(NULL, region->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, region->offset);
	if (slot->memory == MAP_FAILED)
		err(1, "mmap");
	slot->guest = region->guest;
	slot->size = region->size;
}

static void drop(struct slot *slots, const struct region *region)
{
	struct slot *slot = slots;

	while (slot < slots + SLOTS && (slot->memory == NULL || slot->guest != region->guest))
		slot++;
	if (slot == slots + SLOTS || munmap(slot->memory, slot->size) != 0)
		errx(1, "no such slot");
	slot->memory = NULL;
}

static void back_end(int sock)
{
	static struct slot slots[SLOTS];
	struct message message;
	int fd;

	while (receive_message(sock, &message, &fd)) {
		struct region region = message.payload.region;

		switch (message.header.request) {
		case GET_FEATURES:
			answer(sock, &message, FEATURES);
			continue;
		case GET_PROTOCOL_FEATURES:
			answer(sock, &message, PROTOCOL);
			continue;
		case GET_MAX_MEM_SLOTS:
			answer(sock, &message, SLOTS);
			continue;
		case ADD_MEM_REG:
			add(slots, &region, fd);
			break;
		case REM_MEM_REG:
			drop(slots, &region);
			break;
		}
		if (fd >= 0)
			close(fd);
		if (message.header.flags & NEED_REPLY)
			answer(sock, &message, 0);
	}
}

/* A front end. */

static uint64_t await(int sock, enum request request)
{
	struct message reply;
	int fd;

	if (!receive_message(sock, &reply, &fd) || reply.header.request != request || !(reply.header.flags & REPLY))
		errx(1, "no reply to %d", request);
	return reply.payload.number;
}

static void tell(int sock, enum request request, const void *payload, uint32_t size, int fd)
{
	struct message message = { .header = { request, VERSION | NEED_REPLY, size } };

	memcpy(&message.payload, payload, size);
	send_message(sock, &message, fd);
}

static uint64_t ask(int sock, enum request request)
{
	struct message message = { .header = { request, VERSION, 0 } };

	send_message(sock, &message, -1);
	return await(sock, request);
}

/* As our front end does it: what was added is confirmed. */
static void change(int sock, enum request request, const struct region *region, int fd)
{
	tell(sock, request, region, sizeof(*region), fd);
	if (await(sock, request) != 0)
		errx(1, "%d was refused", request);
	if (request == ADD_MEM_REG)
		ask(sock, GET_FEATURES);
}

static void negotiate(int sock)
{
	uint64_t features = ask(sock, GET_FEATURES) & FEATURES, protocol = ask(sock, GET_PROTOCOL_FEATURES) & PROTOCOL;
	struct message message = { { SET_PROTOCOL_FEATURES, VERSION, sizeof(protocol) }, { .number = protocol } };

	if (features != FEATURES || protocol != PROTOCOL)
		errx(1, "it does not offer what is needed");
	send_message(sock, &message, -1); /* acknowledged is only what comes after it */
	tell(sock, SET_OWNER, NULL, 0, -1);
	tell(sock, SET_FEATURES, &features, sizeof(features), -1);
	if (await(sock, SET_OWNER) != 0 || await(sock, SET_FEATURES) != 0)
		errx(1, "it refuses to begin");
}

static struct region slot_region(long number, long size)
{
	uint64_t at = (uint64_t)number * size;

	return (struct region){ 0, LOWEST + at, size, LOWEST + at, at };
}

static void front_end(int sock, int fd, long others, long size, long times)
{
	struct region region = slot_region(others, size);
	int64_t *took = calloc(times, sizeof(*took));

	if (took == NULL)
		err(1, "calloc");
	negotiate(sock);
	for (long number = 0; number < others; number++) {
		struct region other = slot_region(number, size);

		change(sock, ADD_MEM_REG, &other, fd);
	}
	for (long round = 0; round < times; round++) {
		int64_t start = now();

		change(sock, ADD_MEM_REG, &region, fd);
		change(sock, REM_MEM_REG, &region, -1);
		took[round] = now() - start;
	}
	if (fwrite(took, sizeof(*took), times, stdout) != (size_t)times)
		err(1, "fwrite");
	free(took);
}

int main(int argc, char **argv)
{
	if (argc == 3 && strcmp(argv[1], "back-end") == 0)
		back_end(number(argv[2]));
	else if (argc == 7 && strcmp(argv[1], "front-end") == 0)
		front_end(number(argv[2]), number(argv[3]), number(argv[4]), number(argv[5]), number(argv[6]));
	else
		errx(2, "see the head of peers.c");
	return 0;
}
