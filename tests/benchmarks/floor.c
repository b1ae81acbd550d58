/*
 * What the machine itself takes, in C: the limits that our devices are measured against.
 *
 *   floor echo KICK CALL                      answer each signal of one eventfd by one of the other, until killed
 *   floor trips KICK CALL TIMES               signal, and wait for the answer; nanoseconds of each, as 64-bit words
 *   floor trips KICK CALL TIMES RAM AVAIL USED SIZE FROM
 *                                             the same with a request of a split ring: chain 0 is made available anew
 *                                             each time. The file RAM has the rings of SIZE entries at AVAIL and USED,
 *                                             and their indices are at FROM
 *   floor punch FD BLOCK TIMES                punch TIMES holes of BLOCK bytes, one behind the other: nanoseconds of all
 *   floor populate FD BLOCK TIMES             MADV_POPULATE_WRITE of such ranges: nanoseconds of all
 *
 * Descriptors are inherited. Whatever fails ends the program with a message.
 */

#define _GNU_SOURCE

#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { WAIT_MS = 10000, RAM_BYTES = 1 << 16 };

struct ring {
	_Atomic uint16_t *avail; /* flags, idx, entries, used_event */
	_Atomic uint16_t *used;	 /* flags, idx */
	uint16_t size;
	uint16_t idx;
};

static int64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static long number(const char *text)
{
	char *end;
	long value = strtol(text, &end, 0);
	if (*text == '\0' || *end != '\0')
		errx(2, "%s is no number", text);
	return value;
}

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

static void echo(int kick, int call)
{
	for (;;) {
		take_event(kick);
		signal_event(call);
	}
}

/* Chain 0 once more, with a call as soon as it is used. */
static void offer(struct ring *ring)
{
	atomic_store(&ring->avail[2 + ring->idx % ring->size], 0);
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
			offer(ring);
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
	};
}

static int64_t punch(int fd, long block, long times)
{
	int64_t start = now();
	for (long at = 0; at < times; at++)
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at * block, block) != 0)
			err(1, "fallocate");
	return now() - start;
}

static int64_t populate(int fd, long block, long times)
{
	char *memory = mmap(NULL, block * times, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (memory == MAP_FAILED)
		err(1, "mmap");
	int64_t start = now();
	for (long at = 0; at < times; at++)
		if (madvise(memory + at * block, block, MADV_POPULATE_WRITE) != 0)
			err(1, "madvise");
	return now() - start;
}

int main(int argc, char **argv)
{
	const char *what = argc > 3 ? argv[1] : "";
	if (strcmp(what, "echo") == 0 && argc == 4) {
		echo(number(argv[2]), number(argv[3]));
	} else if (strcmp(what, "trips") == 0 && argc == 5) {
		trips(number(argv[2]), number(argv[3]), number(argv[4]), NULL);
	} else if (strcmp(what, "trips") == 0 && argc == 10) {
		struct ring ring = ring_of(argv + 5);
		trips(number(argv[2]), number(argv[3]), number(argv[4]), &ring);
	} else if (strcmp(what, "punch") == 0 && argc == 5) {
		printf("%ld\n", (long)punch(number(argv[2]), number(argv[3]), number(argv[4])));
	} else if (strcmp(what, "populate") == 0 && argc == 5) {
		printf("%ld\n", (long)populate(number(argv[2]), number(argv[3]), number(argv[4])));
	} else {
		errx(2, "see the head of floor.c");
	}
	return 0;
}
