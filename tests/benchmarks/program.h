/* What time it is, and what number an argument says: for the programs that measure, floor.c and peers.c. */

#ifndef PROGRAM_H
#define PROGRAM_H

#include <err.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

/* Nanoseconds, from some moment on. */
static inline int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Whatever is no number ends the program. */
static inline long number(const char *text)
{
	char *end;
	long value = strtol(text, &end, 0);

	if (*text == '\0' || *end != '\0')
		errx(2, "%s is no number", text);
	return value;
}

#endif
