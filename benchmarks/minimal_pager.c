/* The yardstick for demand faults: the least that a pager can do, and a thread that touches pages.
 *
 * `serve` is the loop of every userfaultfd handler: poll, read, copy.  `touch` measures what the one who
 * touches a missing page waits.  Built by benchmarks/demand_faults.py:  cc -O2 -shared -fPIC
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* Serve until `stop` is readable.  `base` is where the pages are missing, `source` where they are here. */
long serve(int uffd, int stop, uint64_t base, uint64_t source)
{
    struct pollfd wait[2] = {{uffd, POLLIN, 0}, {stop, POLLIN, 0}};
    struct uffd_msg message;
    long served = 0;

    for (;;) {
        if (poll(wait, 2, -1) < 0 && errno != EINTR)
            return -1;
        if (wait[1].revents)
            return served;
        if (read(uffd, &message, sizeof message) != sizeof message)
            continue;
        uint64_t offset = (message.arg.pagefault.address & ~4095ULL) - base;
        struct uffdio_copy copy = {.dst = base + offset, .src = source + offset, .len = 4096};
        if (ioctl(uffd, UFFDIO_COPY, &copy) < 0 && errno != EEXIST)
            return -1;
        served++;
    }
}

/* Touch pages in this order, and note how long each took, in nanoseconds. */
void touch(volatile char *memory, const int64_t *pages, long count, uint64_t *took)
{
    struct timespec before, after;

    for (long i = 0; i < count; i++) {
        clock_gettime(CLOCK_MONOTONIC, &before);
        (void)memory[pages[i] * 4096];
        clock_gettime(CLOCK_MONOTONIC, &after);
        took[i] = (after.tv_sec - before.tv_sec) * 1000000000ULL + after.tv_nsec - before.tv_nsec;
    }
}
