/*
 * What the machine itself takes, in C: the limits that our devices are measured against.
 *
 *   floor echo KICK CALL                      answer each signal of one eventfd by one of the other, until killed
 *   floor trips KICK CALL TIMES               signal, and wait for the answer; nanoseconds of each, as 64-bit words
 *   floor trips KICK CALL TIMES RAM AVAIL USED SIZE FROM HEAD CHAINS
 *                                             the same with a request of a split ring: CHAINS chains of two descriptors
 *                                             each, from descriptor HEAD on, are made available in turn, one each time.
 *                                             The file RAM has the rings of SIZE entries at AVAIL and USED, and their
 *                                             indices are at FROM
 *   floor punch FD BLOCK TIMES KICK           wait for the eventfd KICK unless it is -1, then punch TIMES holes of BLOCK
 *                                             bytes, one behind the other: nanoseconds of all holes
 *   floor populate FD BLOCK TIMES KICK        the same with MADV_POPULATE_WRITE of such ranges
 *   floor walk FD BYTES                       find the runs of set bits in the file, a bitmap: nanoseconds, runs and bits
 *   floor save FD BYTES                       write so much to the file, and fsync: nanoseconds
 *   floor slots FD BYTES TIMES PROCESSOR LOOK pass the file to a process on that processor, which maps so much of it and
 *                                             answers; have it unmapped, and answered; nanoseconds of each such round, as
 *                                             64-bit words. Either looks for LOOK nanoseconds before it sleeps
 *
 * Descriptors are inherited. Whatever fails ends the program with a message.
 */

#define _GNU_SOURCE

#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fd_message.h"
#include "program.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { WAIT_MS = 10000, RAM_BYTES = 1 << 16 };

struct ring {
	_Atomic uint16_t *avail; /* flags, idx, entries, used_event */
	_Atomic uint16_t *used;	 /* flags, idx */
	uint16_t size;
	uint16_t idx;
	uint16_t head;
	uint16_t chains;
};

static void signal_event(int fd)
{
	uint64_t one = 1;
	if (write(fd, &one, sizeof(one)) != sizeof(one))
		err(1, "write");
}

static void take_event(int fd)
{
	uint64_t value;
	if (read(fd, &value, sizeof(value)) != sizeof(value))
		err(1, "read");
}

static void await_kick(int kick)
{
	if (kick >= 0)
		take_event(kick);
}

static void echo(int kick, int call)
{
	for (;;) {
		take_event(kick);
		signal_event(call);
	}
}

/* A chain once more, with a call as soon as it is used. */
static void offer(struct ring *ring, long trip)
{
	atomic_store(&ring->avail[2 + ring->idx % ring->size], ring->head + 2 * (trip % ring->chains));
	atomic_store(&ring->avail[2 + ring->size], ring->idx);
	ring->idx++;
	atomic_store(&ring->avail[1], ring->idx);
}

static void trips(int kick, int call, long times, struct ring *ring)
{
	struct pollfd waits = {.fd = call, .events = POLLIN};
	int64_t *took = calloc(times, sizeof(*took));
	if (took == NULL)
		err(1, "calloc");
	for (long trip = 0; trip < times; trip++) {
		if (ring != NULL)
			offer(ring, trip);
		int64_t start = now();
		signal_event(kick);
		do { /* a device may call without a reason */
			if (poll(&waits, 1, WAIT_MS) != 1)
				errx(1, "no call came");
			take_event(call);
		} while (ring != NULL && atomic_load(&ring->used[1]) != ring->idx);
		took[trip] = now() - start;
	}
	if (fwrite(took, sizeof(*took), times, stdout) != (size_t)times)
		err(1, "fwrite");
	free(took);
}

static struct ring ring_of(char **words)
{
	char *ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, number(words[0]), 0);
	if (ram == MAP_FAILED)
		err(1, "mmap");
	return (struct ring){
		.avail = (_Atomic uint16_t *)(ram + number(words[1])),
		.used = (_Atomic uint16_t *)(ram + number(words[2])),
		.size = number(words[3]),
		.idx = number(words[4]),
		.head = number(words[5]),
		.chains = number(words[6]),
	};
}

static int64_t punch(int fd, long block, long times, int kick)
{
	await_kick(kick);
	int64_t start = now();
	for (long at = 0; at < times; at++)
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at * block, block) != 0)
			err(1, "fallocate");
	return now() - start;
}

static int64_t populate(int fd, long block, long times, int kick)
{
	char *memory = mmap(NULL, block * times, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (memory == MAP_FAILED)
		err(1, "mmap");
	await_kick(kick);
	int64_t start = now();
	for (long at = 0; at < times; at++)
		if (madvise(memory + at * block, block, MADV_POPULATE_WRITE) != 0)
			err(1, "madvise");
	return now() - start;
}

static void *file_content(int fd, size_t size)
{
	void *bytes = calloc(1, (size + 7) / 8 * 8);

	if (bytes == NULL || pread(fd, bytes, size, 0) != (ssize_t)size)
		err(1, "pread");
	return bytes;
}

/* Where the next bit is as those of `flip` are not, from `at` on; `end` if there is none. */
static uint64_t find(const uint64_t *words, uint64_t at, uint64_t end, uint64_t flip)
{
	uint64_t mask = UINT64_MAX << at % 64;

	for (uint64_t word = at / 64; word * 64 < end; word++, mask = UINT64_MAX)
		if ((words[word] ^ flip) & mask)
			return word * 64 + __builtin_ctzll((words[word] ^ flip) & mask);
	return end;
}

static void walk(int fd, long size)
{
	const uint64_t *words = file_content(fd, size);
	uint64_t runs = 0, bits = 0, stop;
	int64_t start = now();

	for (uint64_t at = 0; (at = find(words, at, 8 * size, 0)) < 8 * (uint64_t)size; at = stop) {
		stop = find(words, at, 8 * size, UINT64_MAX);
		bits += stop - at;
		runs++;
	}
	printf("%ld %lu %lu\n", (long)(now() - start), (unsigned long)runs, (unsigned long)bits);
}

static int64_t save(int fd, long size)
{
	char *bytes = calloc(1, size);
	int64_t start = now();

	if (bytes == NULL || write(fd, bytes, size) != size || fsync(fd) != 0)
		err(1, "write");
	return now() - start;
}

/* As long as ADD_MEM_REG and REM_MEM_REG, and their acknowledgement: see the vhost-user document. */
enum { MESSAGE = 12 + 8 + 32, ANSWER = 12 + 8 };

static void answer(int sock)
{
	char data[ANSWER] = { 0 };

	send_bytes(sock, data, sizeof(data), -1);
}

static void look(int sock, int64_t patience)
{
	struct pollfd watched = { .fd = sock, .events = POLLIN };
	int64_t end = patience ? now() + patience : 0;

	while (patience && poll(&watched, 1, 0) == 0 && now() < end)
		sched_yield();
}

static bool next_message(int sock, char *data, int *fd, int64_t patience)
{
	look(sock, patience);
	return receive_bytes(sock, data, MESSAGE, fd);
}

static void map_what_comes(int sock, long size, int64_t patience)
{
	char data[MESSAGE];
	int fd;

	while (next_message(sock, data, &fd, patience)) {
		void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

		if (memory == MAP_FAILED)
			err(1, "mmap");
		close(fd);
		answer(sock);
		if (!next_message(sock, data, &fd, patience))
			return;
		munmap(memory, size);
		answer(sock);
	}
}

static void ask(int sock, int fd, int64_t patience)
{
	char data[MESSAGE] = { 0 };

	send_bytes(sock, data, sizeof(data), fd);
	look(sock, patience);
	if (recv(sock, data, ANSWER, MSG_WAITALL) != ANSWER)
		err(1, "recv");
}

static void run_on(long processor)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(processor, &set);
	if (sched_setaffinity(0, sizeof(set), &set) != 0)
		err(1, "sched_setaffinity");
}

static void slots(int fd, long size, long times, long processor, int64_t patience)
{
	int ends[2];
	int64_t *took = calloc(times, sizeof(*took));

	if (took == NULL || socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0)
		err(1, "socketpair");
	if (fork() == 0) {
		close(ends[0]);
		run_on(processor);
		map_what_comes(ends[1], size, patience);
		_exit(0);
	}
	close(ends[1]);
	for (long round = 0; round < times; round++) {
		int64_t start = now();

		ask(ends[0], fd, patience);
		ask(ends[0], -1, patience);
		took[round] = now() - start;
	}
	close(ends[0]);
	wait(NULL);
	if (fwrite(took, sizeof(*took), times, stdout) != (size_t)times)
		err(1, "fwrite");
	free(took);
}

int main(int argc, char **argv)
{
	const char *what = argc > 3 ? argv[1] : "";
	if (strcmp(what, "echo") == 0 && argc == 4) {
		echo(number(argv[2]), number(argv[3]));
	} else if (strcmp(what, "trips") == 0 && argc == 5) {
		trips(number(argv[2]), number(argv[3]), number(argv[4]), NULL);
	} else if (strcmp(what, "trips") == 0 && argc == 12) {
		struct ring ring = ring_of(argv + 5);
		trips(number(argv[2]), number(argv[3]), number(argv[4]), &ring);
	} else if (strcmp(what, "punch") == 0 && argc == 6) {
		printf("%ld\n", (long)punch(number(argv[2]), number(argv[3]), number(argv[4]), number(argv[5])));
	} else if (strcmp(what, "populate") == 0 && argc == 6) {
		printf("%ld\n", (long)populate(number(argv[2]), number(argv[3]), number(argv[4]), number(argv[5])));
	} else if (strcmp(what, "walk") == 0 && argc == 4) {
		walk(number(argv[2]), number(argv[3]));
	} else if (strcmp(what, "save") == 0 && argc == 4) {
		printf("%ld\n", (long)save(number(argv[2]), number(argv[3])));
	} else if (strcmp(what, "slots") == 0 && argc == 7) {
		slots(number(argv[2]), number(argv[3]), number(argv[4]), number(argv[5]), number(argv[6]));
	} else {
		errx(2, "see the head of floor.c");
	}
	return 0;
}
