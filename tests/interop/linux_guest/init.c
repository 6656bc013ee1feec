/* init of the test guest: writes its disk, reads it back and compares; see linux_guest.py.
 *
 * Each of WORKERS processes has a part of the disk, and one request at the device at a time.  Write n of a
 * worker is 1 + n % MOST blocks from block 37 n on.  Word w of the disk becomes n (FACTOR + 2 w) by it.
 * The data of a write is prepared AHEAD writes before, so in a postcopy the back end finds it missing.
 * What has been read into a buffer is compared again before the buffer is used the next time: in a precopy
 * only the back end's log has the page moved.
 *
 * With "memory=MIB" on the kernel's command line one process more writes that much memory, page by page in an
 * order that jumps.  Write n of it makes word w of its page n (FACTOR + 2 w).  Before, all words of the page must be
 * what they were made one round before.  The guest then tells its clocks, too, in milliseconds: CLOCK_MONOTONIC,
 * CLOCK_REALTIME and the PC's own clock (0: it has none).  "every=MS" is how often it tells of its work.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/rtc.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORKERS 4
#define BLOCK 4096
#define WORDS (BLOCK / 8)
#define MOST 8
#define AHEAD 64
#define READS 64
#define FACTOR 0x9E3779B97F4A7C15u

struct worker {
    uint64_t writes, wrong;
};
static struct {
    volatile int stop;
    struct worker workers[WORKERS], memory;
} *shared;

static long disk_blocks;
static int disk, clock_of_pc = -1, every_ms = 50;
static long memory_bytes;

/* Say why the guest cannot go on, and end it. */
static void give_up(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    printf("given up: ");
    vprintf(format, arguments);
    printf(": %s\n", strerror(errno));
    fflush(stdout);
    reboot(RB_POWER_OFF);
    _exit(1);
}

static void *pages(size_t length, int kind)
{
    void *made = mmap(NULL, length, PROT_READ | PROT_WRITE, kind | MAP_ANONYMOUS, -1, 0);

    if (made == MAP_FAILED)
        give_up("%zu bytes of memory", length);
    return made;
}

/* /0.ko, /1.ko and so on, in this order. */
static void load_modules(void)
{
    char path[16];

    for (int i = 0;; i++) {
        snprintf(path, sizeof(path), "/%d.ko", i);
        int fd = open(path, O_RDONLY);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0))
            give_up("%s", path);
        close(fd);
    }
}

static void open_disk(void)
{
    for (int tries = 0; tries < 500; tries++) {
        disk = open("/dev/vda", O_RDWR | O_DIRECT);
        if (disk >= 0)
            break;
        usleep(10000);
    }
    if (disk < 0)
        give_up("/dev/vda");
    disk_blocks = lseek(disk, 0, SEEK_END) / BLOCK;
}

static void fill(uint64_t *data, uint64_t n, long block, long count)
{
    for (long i = 0; i < count * WORDS; i++)
        data[i] = n * (FACTOR + 2 * (uint64_t)(block * WORDS + i));
}

/* How many words are not what the writes of the table made them. */
static uint64_t differing(const uint64_t *data, const uint64_t *table, long block, long count)
{
    uint64_t wrong = 0;

    for (long i = 0; i < count * WORDS; i++)
        wrong += data[i] != table[i / WORDS] * (FACTOR + 2 * (uint64_t)(block * WORDS + i));
    return wrong;
}

static void transfer(int is_write, void *data, long block, long count)
{
    size_t length = count * BLOCK;
    ssize_t done = is_write ? pwrite(disk, data, length, block * BLOCK)
                            : pread(disk, data, length, block * BLOCK);

    if (done != (ssize_t)length)
        give_up("%s %ld blocks at %ld gave %zd", is_write ? "write" : "read", count, block, done);
}

/* A buffer that the device alone writes, and what it has been seen to hold: zeros at first. */
struct reading {
    uint64_t *data, table[MOST];
    long block;
};

static uint64_t check(const struct reading *reading)
{
    return differing(reading->data, reading->table, reading->block, MOST);
}

static uint64_t read_and_check(struct reading *reading, const uint64_t *table, long block)
{
    uint64_t wrong = check(reading);

    transfer(0, reading->data, block, MOST);
    memcpy(reading->table, table, sizeof(reading->table));
    reading->block = block;
    return wrong + check(reading);
}

static void work(struct worker *own, long first, long blocks)
{
    size_t slot = MOST * WORDS;
    uint64_t *prepared = pages(AHEAD * MOST * BLOCK, MAP_PRIVATE);
    uint64_t *table = pages(blocks * sizeof(uint64_t), MAP_PRIVATE);
    struct reading *readings = pages(READS * sizeof(*readings), MAP_PRIVATE);
    long places = blocks - MOST;
    uint64_t n;

    for (int i = 0; i < READS; i++)
        readings[i].data = pages(MOST * BLOCK, MAP_PRIVATE);
    for (n = 1; n <= AHEAD; n++)
        fill(prepared + n % AHEAD * slot, n, first + 37 * n % places, 1 + n % MOST);
    for (n = 1; !shared->stop; n++) {
        uint64_t *data = prepared + n % AHEAD * slot, next = n + AHEAD;
        long at = 37 * n % places, count = 1 + n % MOST;

        transfer(1, data, first + at, count);
        for (long i = 0; i < count; i++)
            table[at + i] = n;
        own->writes = n;
        fill(data, next, first + 37 * next % places, 1 + next % MOST);
        if (n % 16 == 0 && fsync(disk))
            give_up("fsync");
        at = 53 * n % places;
        own->wrong += read_and_check(&readings[n % READS], table + at, first + at);
    }
    for (int i = 0; i < READS; i++)
        own->wrong += check(&readings[i]);
    for (long at = 0; at + MOST <= blocks; at += MOST)
        own->wrong += read_and_check(&readings[0], table + at, first + at);
}

/* The step is a prime, so each page is written once in a round. */
static uint64_t *page_of(uint64_t *memory, uint64_t n, uint64_t count)
{
    return memory + n * 40961 % count * WORDS;
}

static uint64_t check_page(const uint64_t *page, uint64_t n)
{
    uint64_t wrong = 0;

    for (uint64_t i = 0; i < WORDS; i++)
        wrong += page[i] != n * (FACTOR + 2 * i);
    return wrong;
}

static void work_in_memory(struct worker *own)
{
    uint64_t count = memory_bytes / BLOCK, n;
    uint64_t *memory = pages(memory_bytes, MAP_PRIVATE);

    for (n = 1; !shared->stop; n++) {
        uint64_t *page = page_of(memory, n, count);

        own->wrong += check_page(page, n > count ? n - count : 0);
        for (uint64_t i = 0; i < WORDS; i++)
            page[i] = n * (FACTOR + 2 * i);
        own->writes = n;
    }
    for (uint64_t last = n; n < last + count; n++)
        own->wrong += check_page(page_of(memory, n, count), n > count ? n - count : 0);
}

static int told_to_stop(void)
{
    struct pollfd console = {.fd = 0, .events = POLLIN};
    char line[64];

    return poll(&console, 1, every_ms) > 0 && read(0, line, sizeof(line)) > 0;
}

static long milliseconds(int clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static long pc_milliseconds(void)
{
    struct rtc_time read;

    if (clock_of_pc < 0)
        return 0;
    if (ioctl(clock_of_pc, RTC_RD_TIME, &read))
        give_up("the PC's clock");
    struct tm now = {.tm_sec = read.tm_sec, .tm_min = read.tm_min, .tm_hour = read.tm_hour,
                     .tm_mday = read.tm_mday, .tm_mon = read.tm_mon, .tm_year = read.tm_year};
    return timegm(&now) * 1000;
}

static void say(const char *what)
{
    uint64_t wrong = 0;

    if (memory_bytes)
        printf("memory %lu wrong %lu clocks %ld %ld %ld\n", shared->memory.writes,
               shared->memory.wrong, milliseconds(CLOCK_MONOTONIC), milliseconds(CLOCK_REALTIME),
               pc_milliseconds());
    printf("%s", what);
    for (int i = 0; i < WORKERS; i++) {
        printf(" %lu", shared->workers[i].writes);
        wrong += shared->workers[i].wrong;
    }
    printf(" wrong %lu\n", wrong);
    fflush(stdout);
}

static void begin_memory(void)
{
    const char *wanted = getenv("memory");

    memory_bytes = wanted ? atol(wanted) << 20 : 0;
    if (!memory_bytes)
        return;
    clock_of_pc = open("/dev/rtc0", O_RDONLY);
    pid_t made = fork();
    if (made < 0)
        give_up("fork");
    if (!made) {
        work_in_memory(&shared->memory);
        _exit(0);
    }
}

int main(void)
{
    int console;
    long part;

    mount("dev", "/dev", "devtmpfs", 0, "");
    console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    if (getenv("every"))
        every_ms = atoi(getenv("every"));
    load_modules();
    open_disk();
    part = disk_blocks / WORKERS;
    shared = pages(BLOCK, MAP_SHARED);
    printf("disk of %ld blocks\n", disk_blocks);
    fflush(stdout);
    for (int i = 0; i < WORKERS; i++) {
        pid_t made = fork();

        if (made < 0)
            give_up("fork");
        if (!made) {
            work(&shared->workers[i], i * part, part);
            _exit(0);
        }
    }
    begin_memory();
    while (!told_to_stop())
        say("writes");
    shared->stop = 1;
    for (int status; wait(&status) > 0;) {
        if (status)
            give_up("a worker ended with %d", status);
    }
    say("stopped");
    reboot(RB_POWER_OFF);
}
