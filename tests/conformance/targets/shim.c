/* A virtio-mem device of bits alone, behind the kit's JSON lines: docs/conformance-targets.md. No library is needed,
 * since the kit's lines are always of the same form. */

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define ADDR (UINT64_C(4) << 30)
#define FEATURES (UINT64_C(1) << 32 | 1 << 2 | 1 << 1)
#define MOST_BLOCKS 65536

enum { PLUG, UNPLUG, UNPLUG_ALL, STATE };
enum { ACK, NACK, BUSY, ERROR };

static uint64_t region, block, target, plugged;
static bool bits[MOST_BLOCKS];

static void clear(void)
{
    memset(bits, 0, sizeof bits);
    plugged = 0;
}

static void say_bytes(const char *key, const uint64_t *words, int bytes)
{
    printf("{\"%s\":\"", key);
    for (int at = 0; at < bytes; at++)
        printf("%02x", (unsigned)(words[at / 8] >> 8 * (at % 8) & 0xff));
    printf("\"}\n");
}

static uint64_t number(const uint8_t *at, int bytes)
{
    uint64_t value = 0;

    while (bytes--)
        value = value << 8 | at[bytes];
    return value;
}

/* The type of the answer; *state is what a STATE request asks for. */
static int answer(const uint8_t *request, int *state)
{
    uint64_t type = number(request, 2), offset = number(request + 8, 8) - ADDR, count = number(request + 16, 2);
    uint64_t first = offset / block, here = 0;

    if (type == UNPLUG_ALL) {
        clear();
        return ACK;
    }
    if (type > STATE || offset % block || !count || first >= region / block || count > region / block - first)
        return ERROR;
    for (uint64_t at = first; at < first + count; at++)
        here += bits[at];
    if (type == STATE) {
        *state = here == count ? 0 : here ? 2 : 1;
        return ACK;
    }
    if (here != (type == PLUG ? 0 : count))
        return ERROR;
    if (type == PLUG && (plugged + count) * block > target)
        return NACK;
    memset(bits + first, type == PLUG, count);
    plugged += type == PLUG ? count : -count;
    return ACK;
}

static void serve_request(const char *digits)
{
    uint8_t request[24];
    uint64_t response[2] = { 0, 0 };
    int state = 0;

    for (int at = 0; at < 24; at++)
        if (sscanf(digits + 2 * at, "%2" SCNx8, request + at) != 1)
            return;
    response[0] = answer(request, &state);
    response[1] = state;
    say_bytes("response", response, 10);
}

int main(void)
{
    static char line[4096];
    uint64_t value;

    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("{\"virtio-mem-conformance\":1,\"version\":\"shim.c 1\","
         "\"capabilities\":[\"RESTART\",\"WISH\",\"SET_TARGET\",\"SYSTEM_RESET\"]}");
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "{\"do\":\"start\",\"region_size\":%" SCNu64 ",\"block_size\":%" SCNu64
                   ",\"requested_size\":%" SCNu64, &region, &block, &target) == 3) {
            clear();
            if (!block || block & (block - 1) || region % block || region / block > MOST_BLOCKS)
                puts("{\"refused\":\"I have no such blocks\"}");
            else
                printf("{\"offered_features\":%" PRIu64 "}\n", FEATURES);
        } else if (sscanf(line, "{\"do\":\"begin\",\"features\":%" SCNu64, &value) == 1) {
            bool good = !(value & ~FEATURES) && value >> 1 & 1 && value >> 32 & 1;
            printf("{\"accepted\":%s}\n", good ? "true" : "false");
        } else if (!strncmp(line, "{\"do\":\"config\"", 14)) {
            uint64_t config[7] = { block, 0, ADDR, region, region, plugged * block, target };
            say_bytes("config", config, 56);
        } else if (!strncmp(line, "{\"do\":\"request\",\"request\":\"", 27)) {
            serve_request(line + 27);
        } else if (sscanf(line, "{\"do\":\"set_target\",\"requested_size\":%" SCNu64, &value) == 1) {
            if (value % block || value > region) {
                printf("{\"refused\":\"%" PRIu64 " is not what such a region can have\"}\n", value);
                continue;
            }
            target = value;
            puts("{}");
        } else {
            if (!strncmp(line, "{\"do\":\"system_reset\"", 20))
                clear();
            puts("{}");
        }
    }
    return 0;
}
