/* The SIGBUS handler; see guard_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <unistd.h>

#include "guard.h"

_Thread_local sigjmp_buf *volatile vu_landing;

static struct sigaction before;

/* The kernel's own word, or a handler above ours that passes it on by raising it anew, as Python's faulthandler does. */
static bool is_fault(const siginfo_t *info)
{
	if (info->si_code == SI_TKILL)
		return info->si_pid == getpid();
	return info->si_code == BUS_ADRERR || info->si_code == BUS_MCEERR_AR;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	if (vu_landing && is_fault(info))
		siglongjmp(*vu_landing, 1);
	if (before.sa_flags & SA_SIGINFO) {
		before.sa_sigaction(number, info, context);
	} else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
		/* An access is tried again when we return, and meets its fate; what somebody sent must be sent again. */
		sigaction(number, &before, NULL);
		if (info->si_code <= 0)
			raise(number);
	} else {
		before.sa_handler(number);
	}
}

int vu_guard_install(void)
{
	/* SA_NODEFER: the jump out of the handler restores no signal mask. */
	struct sigaction ours = { .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };
	static bool installed;

	/* Once: a handler that came later has ours to pass on to, and to put ours in front again would make a circle. */
	if (installed)
		return 0;
	sigemptyset(&ours.sa_mask);
	if (sigaction(SIGBUS, &ours, &before))
		return -errno;
	installed = true;
	return 0;
}
