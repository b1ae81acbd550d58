/* The SIGBUS handler; see guard_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>

#include "guard.h"

_Thread_local sigjmp_buf *vu_landing;

static struct sigaction before;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	if (vu_landing)
		siglongjmp(*vu_landing, 1);
	if (before.sa_flags & SA_SIGINFO)
		before.sa_sigaction(number, info, context);
	else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN)
		sigaction(number, &before, NULL); /* the access is tried again, and meets its fate */
	else
		before.sa_handler(number);
}

int vu_guard_install(void)
{
	/* SA_NODEFER: the jump out of the handler restores no signal mask. */
	struct sigaction ours = { .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };
	struct sigaction now;

	if (sigaction(SIGBUS, NULL, &now))
		return -errno;
	if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_bus_error)
		return 0;
	before = now;
	return sigaction(SIGBUS, &ours, NULL) ? -errno : 0;
}
