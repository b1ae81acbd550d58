/* Threads that nobody waits for; see detached.h. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "detached.h"

enum { STACK_SIZE = 1 << 16, MOST_THREADS = 256 };

struct task {
	void *(*work)(void *);
	void *argument;
};

static atomic_int threads;

static void *run(void *argument)
{
	struct task task = *(struct task *)argument;

	free(argument);
	task.work(task.argument);
	atomic_fetch_sub(&threads, 1);
	return NULL;
}

/* With a small stack, or an ordinary one where thread-local variables need so much. */
static bool create(struct task *task, size_t stack_size)
{
	pthread_attr_t attributes;
	pthread_t thread;
	bool created;

	if (pthread_attr_init(&attributes))
		return false;
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	if (stack_size)
		pthread_attr_setstacksize(&attributes, stack_size);
	created = !pthread_create(&thread, &attributes, run, task);
	pthread_attr_destroy(&attributes);
	return created;
}

bool start_detached(void *(*work)(void *), void *argument)
{
	struct task *task = malloc(sizeof(*task));
	sigset_t all, before;
	bool started = false;

	if (!task)
		return false;
	*task = (struct task){ work, argument };
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the process's own threads */
	if (atomic_fetch_add(&threads, 1) < MOST_THREADS)
		started = create(task, STACK_SIZE) || create(task, 0);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!started) {
		atomic_fetch_sub(&threads, 1);
		free(task);
	}
	return started;
}
