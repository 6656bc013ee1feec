/* The driver of a virtio disk, as lean as can be: random reads of 4 KiB at a queue depth, for a time.

   Guest memory is one region at guest address 0; the ring has been handed to a back end by vhost-user. */

#include <poll.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096u

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct places { uint64_t descriptors, available, used, headers, statuses, data; uint32_t size; };
struct header { uint32_t type, reserved; uint64_t sector; };

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Reads until so many ns have passed; returns how many, or -1 - the slot whose status was wrong.
   Latencies go to a ring of samples, in ns. */
int64_t read_blocks(uint8_t *memory, const struct places *at, int kick, int call, uint32_t depth,
                    uint64_t blocks, uint64_t duration_ns, uint32_t *samples, uint64_t n_samples)
{
    struct descriptor *descriptors = (struct descriptor *)(memory + at->descriptors);
    struct header *headers = (struct header *)(memory + at->headers);
    uint8_t *statuses = memory + at->statuses;
    uint16_t *available = (uint16_t *)(memory + at->available);
    uint16_t *used = (uint16_t *)(memory + at->used);
    uint32_t *elements = (uint32_t *)(memory + at->used + 4);
    uint16_t offered = available[1], seen = used[1];
    uint64_t random = 88172645463325252ull, begun[256], one = 1, count = 0;
    uint64_t end = now_ns() + duration_ns;
    uint32_t in_flight = 0, ready[256], n_ready = 0;

    for (uint32_t slot = 0; slot < depth; slot++) {
        struct descriptor *chain = descriptors + 3 * slot;
        chain[0] = (struct descriptor){at->headers + 16 * slot, 16, 1, 3 * slot + 1};
        chain[1] = (struct descriptor){at->data + (uint64_t)BLOCK * slot, BLOCK, 3, 3 * slot + 2};
        chain[2] = (struct descriptor){at->statuses + slot, 1, 2, 0};
        ready[n_ready++] = slot;
    }
    for (;;) {
        uint64_t time = now_ns();
        if (time >= end)
            n_ready = 0;
        if (!n_ready && !in_flight)
            return (int64_t)count;
        for (uint32_t n = 0; n < n_ready; n++) {
            uint32_t slot = ready[n];
            random ^= random << 13; random ^= random >> 7; random ^= random << 17;
            headers[slot] = (struct header){0, 0, random % blocks * (BLOCK / 512)};
            statuses[slot] = 0xff;
            begun[slot] = time;
            available[2 + offered++ % at->size] = 3 * slot;
            in_flight++;
        }
        if (n_ready) {
            __atomic_store_n(&available[1], offered, __ATOMIC_SEQ_CST);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            if (!(__atomic_load_n(&used[0], __ATOMIC_SEQ_CST) & 1) && write(kick, &one, 8) != 8)
                return -1000;
            n_ready = 0;
        }
        while (__atomic_load_n(&used[1], __ATOMIC_SEQ_CST) == seen) {
            /* qemu-storage-daemon makes it non-blocking, for us too. */
            struct pollfd interrupt = {call, POLLIN, 0};
            uint64_t events;
            if (poll(&interrupt, 1, 10000) != 1 || read(call, &events, 8) != 8)
                return -1001;
        }
        time = now_ns();
        while (__atomic_load_n(&used[1], __ATOMIC_SEQ_CST) != seen) {
            uint32_t slot = elements[2 * (seen++ % at->size)] / 3;
            if (statuses[slot])
                return -1 - (int64_t)slot;
            samples[count++ % n_samples] = (uint32_t)(time - begun[slot]);
            ready[n_ready++] = slot;
            in_flight--;
        }
    }
}
