/* A virtio-mem device of bits alone, behind the kit's JSON lines: docs/conformance-targets.md. No library is needed,
 * since the kit's lines are always of the same form. For a machine with the least significant byte first. */

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define ADDR ((uint64_t)4 << 30)
#define FEATURES ((uint64_t)1 << 32 | 1 << 1)
#define MOST_BLOCKS 65536

enum { PLUG, UNPLUG, UNPLUG_ALL, STATE };
enum { ACK, NACK, BUSY, ERROR };

static uint64_t region, block, target, plugged;
static uint8_t bits[MOST_BLOCKS];

struct request { uint16_t type, padding[3]; uint64_t addr; uint16_t nb_blocks, more[3]; };
struct response { uint16_t type, padding[3], state; };

static void say(const char *key, const void *bytes, int length)
{
    printf("{\"%s\":\"", key);
    for (int at = 0; at < length; at++)
        printf("%02x", ((const uint8_t *)bytes)[at]);
    puts("\"}");
}

static uint16_t answer(uint16_t type, uint64_t offset, uint64_t count, uint16_t *state)
{
    uint64_t first = offset / block, here = 0;

    if (type == UNPLUG_ALL) {
        memset(bits, plugged = 0, sizeof bits);
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

int main(void)
{
    char line[4096];
    uint64_t features;
    struct request request;
    struct response response;

    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("{\"virtio-mem-conformance\":1,\"version\":\"shim.c 1\",\"capabilities\":[\"RESTART\",\"WISH\"]}");
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "{\"do\":\"start\",\"region_size\":%" SCNu64 ",\"block_size\":%" SCNu64
                   ",\"requested_size\":%" SCNu64, &region, &block, &target) == 3) {
            memset(bits, plugged = 0, sizeof bits);
            if (!block || block & (block - 1) || region % block || region / block > MOST_BLOCKS)
                puts("{\"refused\":\"there are no such blocks\"}");
            else
                printf("{\"offered_features\":%" PRIu64 "}\n", FEATURES);
        } else if (sscanf(line, "{\"do\":\"begin\",\"features\":%" SCNu64, &features) == 1) {
            printf("{\"accepted\":%s}\n", features == FEATURES ? "true" : "false");
        } else if (!strncmp(line, "{\"do\":\"config\"", 14)) {
            uint64_t config[7] = { block, 0, ADDR, region, region, plugged * block, target };
            say("config", config, sizeof config);
        } else if (!strncmp(line, "{\"do\":\"request\",\"request\":\"", 27)) {
            for (size_t at = 0; at < sizeof request; at++)
                sscanf(line + 27 + 2 * at, "%2" SCNx8, (uint8_t *)&request + at);
            memset(&response, 0, sizeof response);
            response.type = answer(request.type, request.addr - ADDR, request.nb_blocks, &response.state);
            say("response", &response, sizeof response);
        } else {
            puts("{}");
        }
    }
    return 0;
}
