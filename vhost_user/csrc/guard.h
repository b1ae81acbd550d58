/* How a call that touches guest memory survives a SIGBUS; see guard_api.h. Not seen by Python. */

#ifndef VU_GUARD_H
#define VU_GUARD_H

#include <setjmp.h>
#include <stdatomic.h>
#include <stdint.h>

#include "guard_api.h"

/* Where this thread goes on after a fault; NULL outside of guarded calls. Volatile, because the handler reads it. */
extern _Thread_local sigjmp_buf *volatile vu_landing;

/* Keeps the compiler from moving an access to guest memory out of the guarded call. */
static inline void guard_fence(void)
{
	atomic_signal_fence(memory_order_seq_cst);
}

/*
 * The value of `call`, or of `otherwise` if it faulted. What `call` had changed in our own memory stays as it was at the
 * fault, so `otherwise` must leave something that can be gone on with. Guards don't nest: functions of the core that
 * touch guest memory come unguarded for each other, and guarded for Python.
 */
#define GUARDED(type, call, otherwise)                  \
	({                                              \
		sigjmp_buf landing;                     \
		type guarded;                           \
		if (sigsetjmp(landing, 0)) {            \
			guarded = (otherwise);          \
		} else {                                \
			vu_landing = &landing;          \
			guard_fence();                  \
			guarded = (call);               \
			guard_fence();                  \
		}                                       \
		vu_landing = NULL;                      \
		guarded;                                \
	})

#endif
