/* Threads that nobody waits for, for what may take as long as a peer likes. */

#include <stdbool.h>

/* Starts one that runs `work` with `argument`, all signals blocked; false where 256 of them run, or none can be made. */
bool start_detached(void *(*work)(void *), void *argument);
