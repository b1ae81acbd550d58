/* Threads that nobody waits for; see detached.h. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>

#include "detached.h"

enum { STACK_SIZE = 1 << 16, MOST_THREADS = 256 };

/* Also those that are about to end, where somebody else has a say in that. */
static bool many_threads(void)
{
	struct stat about;

	return !stat("/proc/self/task", &about) && about.st_nlink > MOST_THREADS;
}

bool start_detached(void *(*work)(void *), void *argument)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	pthread_t thread;
	bool started;

	if (many_threads() || pthread_attr_init(&attributes))
		return false;
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, STACK_SIZE);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the process's own threads */
	started = !pthread_create(&thread, &attributes, work, argument);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return started;
}
