/* Makes kernel calls fail, in every process into which it is preloaded, as a shared table says.

   The table is the file that POSTCOPY_FAILING_CALLS names; tests/faults/failing_calls.py writes it.  Each
   row is one kind of call.  All processes count the calls of a kind together. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define ROWS 128
#define ANY (~0ULL)

struct row {
    char name[32];          /* of the C library's function */
    char target[32];        /* part of what a descriptor stands for, or end of a path; "": anything;
                               "@unix", "@inet": a socket of that family */
    uint64_t request;       /* of an ioctl, number of a syscall, flag of an mmap; ANY */
    int32_t error;          /* errno; 0: only count */
    int32_t pid;            /* which process met it last */
    uint64_t first;         /* the first call that fails, from 1 on */
    uint64_t times;         /* how many fail; 0: all from then on */
    _Atomic uint64_t seen;
    _Atomic uint64_t failed;
};

struct table {
    _Atomic uint64_t armed;
    struct row rows[ROWS];
};

static struct table *table;

/* A command that a channel starts, and what that starts, is not ours. */
static int is_ours(int count, char **arguments)
{
    for (int at = 1; at < count; at++)
        if (!strcmp(arguments[at], "postcopy.engine") || !strncmp(arguments[at], "faults.", 7))
            return 1;
    return 0;
}

__attribute__((constructor)) static void begin(int count, char **arguments)
{
    const char *path = is_ours(count, arguments) ? getenv("POSTCOPY_FAILING_CALLS") : NULL;
    int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *(*map)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    void *mapped = map(NULL, sizeof *table, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED)
        table = mapped;
}

static int is_of_family(int fd, const char *family)
{
    int found;
    socklen_t length = sizeof found;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &found, &length))
        return 0;
    return (found == AF_UNIX) == !strcmp(family, "unix");
}

static int stands_for(int fd, const char *path, const char *target)
{
    char link[64], found[256];
    if (target[0] == '@')
        return is_of_family(fd, target + 1);
    if (path) {
        size_t length = strlen(path), end = strlen(target);
        return length >= end && !strcmp(path + length - end, target);
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, found, sizeof found - 1);
    if (length < 0)
        return 0;
    found[length] = 0;
    return strstr(found, target) != NULL;
}

static int fails(const char *name, uint64_t request, int fd, const char *path)
{
    if (!table || !atomic_load_explicit(&table->armed, memory_order_acquire))
        return 0;
    for (struct row *row = table->rows; row < table->rows + ROWS && row->name[0]; row++) {
        int kept = errno;
        if (strcmp(row->name, name) || (row->request != ANY && row->request != request))
            continue;
        if (row->target[0] && !stands_for(fd, path, row->target)) {
            errno = kept;
            continue;
        }
        errno = kept;
        uint64_t number = atomic_fetch_add(&row->seen, 1) + 1;
        if (!row->error || number < row->first || (row->times && number >= row->first + row->times))
            continue;
        atomic_fetch_add(&row->failed, 1);
        row->pid = getpid();
        errno = row->error;
        return 1;
    }
    return 0;
}

#define NEXT(type, name, ...) \
    static type (*next)(__VA_ARGS__); \
    if (!next) \
        next = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    NEXT(int, "ioctl", int, unsigned long, void *);
    return fails("ioctl", request, fd, NULL) ? -1 : next(fd, request, argument);
}

long syscall(long number, ...)
{
    long words[6];
    va_list rest;
    va_start(rest, number);
    for (int at = 0; at < 6; at++)
        words[at] = va_arg(rest, long);
    va_end(rest);
    NEXT(long, "syscall", long, long, long, long, long, long, long);
    if (fails("syscall", number, -1, ""))
        return -1;
    return next(number, words[0], words[1], words[2], words[3], words[4], words[5]);
}

#define MAPS(name) \
    void *name(void *at, size_t length, int protection, int flags, int fd, off_t offset) \
    { \
        NEXT(void *, #name, void *, size_t, int, int, int, off_t); \
        if (fails("mmap", flags & MAP_TYPE, fd, NULL)) \
            return MAP_FAILED; \
        return next(at, length, protection, flags, fd, offset); \
    }
MAPS(mmap)
MAPS(mmap64)

int madvise(void *at, size_t length, int advice)
{
    NEXT(int, "madvise", void *, size_t, int);
    return fails("madvise", advice, -1, "") ? -1 : next(at, length, advice);
}

int mincore(void *at, size_t length, unsigned char *result)
{
    NEXT(int, "mincore", void *, size_t, unsigned char *);
    return fails("mincore", ANY, -1, "") ? -1 : next(at, length, result);
}

#define ALLOCATES(name) \
    int name(int fd, int mode, off_t offset, off_t length) \
    { \
        NEXT(int, #name, int, int, off_t, off_t); \
        return fails("fallocate", mode, fd, NULL) ? -1 : next(fd, mode, offset, length); \
    }
ALLOCATES(fallocate)
ALLOCATES(fallocate64)

#define COPIES(name) \
    ssize_t name(pid_t pid, const struct iovec *here, unsigned long count, \
                 const struct iovec *there, unsigned long count_there, unsigned long flags) \
    { \
        NEXT(ssize_t, #name, pid_t, const struct iovec *, unsigned long, const struct iovec *, \
             unsigned long, unsigned long); \
        if (fails(#name, ANY, -1, "")) \
            return -1; \
        return next(pid, here, count, there, count_there, flags); \
    }
COPIES(process_vm_readv)
COPIES(process_vm_writev)

int memfd_create(const char *name, unsigned flags)
{
    NEXT(int, "memfd_create", const char *, unsigned);
    return fails("memfd_create", ANY, -1, name) ? -1 : next(name, flags);
}

#define TRUNCATES(name) \
    int name(int fd, off_t length) \
    { \
        NEXT(int, #name, int, off_t); \
        return fails("ftruncate", ANY, fd, NULL) ? -1 : next(fd, length); \
    }
TRUNCATES(ftruncate)
TRUNCATES(ftruncate64)

#define SEEKS(name) \
    off_t name(int fd, off_t offset, int whence) \
    { \
        NEXT(off_t, #name, int, off_t, int); \
        return fails("lseek", whence, fd, NULL) ? -1 : next(fd, offset, whence); \
    }
SEEKS(lseek)
SEEKS(lseek64)

#define OPENS(name) \
    int name(const char *path, int flags, ...) \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        NEXT(int, #name, const char *, int, ...); \
        return fails("open", ANY, -1, path) ? -1 : next(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

ssize_t read(int fd, void *into, size_t length)
{
    NEXT(ssize_t, "read", int, void *, size_t);
    return fails("read", ANY, fd, NULL) ? -1 : next(fd, into, length);
}

ssize_t write(int fd, const void *from, size_t length)
{
    NEXT(ssize_t, "write", int, const void *, size_t);
    return fails("write", ANY, fd, NULL) ? -1 : next(fd, from, length);
}

ssize_t pread64(int fd, void *into, size_t length, off_t offset)
{
    NEXT(ssize_t, "pread64", int, void *, size_t, off_t);
    return fails("pread", ANY, fd, NULL) ? -1 : next(fd, into, length, offset);
}

ssize_t pwrite64(int fd, const void *from, size_t length, off_t offset)
{
    NEXT(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    return fails("pwrite", ANY, fd, NULL) ? -1 : next(fd, from, length, offset);
}

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
    NEXT(ssize_t, "writev", int, const struct iovec *, int);
    return fails("writev", ANY, fd, NULL) ? -1 : next(fd, pieces, count);
}

ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t offset)
{
    NEXT(ssize_t, "pwritev", int, const struct iovec *, int, off_t);
    return fails("pwritev", ANY, fd, NULL) ? -1 : next(fd, pieces, count, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    NEXT(ssize_t, "preadv64v2", int, const struct iovec *, int, off_t, int);
    return fails("preadv", ANY, fd, NULL) ? -1 : next(fd, pieces, count, offset, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    NEXT(ssize_t, "pwritev64v2", int, const struct iovec *, int, off_t, int);
    return fails("pwritev", ANY, fd, NULL) ? -1 : next(fd, pieces, count, offset, flags);
}

ssize_t readv(int fd, const struct iovec *pieces, int count)
{
    NEXT(ssize_t, "readv", int, const struct iovec *, int);
    return fails("readv", ANY, fd, NULL) ? -1 : next(fd, pieces, count);
}

ssize_t send(int fd, const void *from, size_t length, int flags)
{
    NEXT(ssize_t, "send", int, const void *, size_t, int);
    return fails("send", ANY, fd, NULL) ? -1 : next(fd, from, length, flags);
}

ssize_t recv(int fd, void *into, size_t length, int flags)
{
    NEXT(ssize_t, "recv", int, void *, size_t, int);
    return fails("recv", ANY, fd, NULL) ? -1 : next(fd, into, length, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    NEXT(ssize_t, "sendmsg", int, const struct msghdr *, int);
    return fails("sendmsg", ANY, fd, NULL) ? -1 : next(fd, message, flags);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    NEXT(ssize_t, "recvmsg", int, struct msghdr *, int);
    return fails("recvmsg", ANY, fd, NULL) ? -1 : next(fd, message, flags);
}

int socket(int family, int kind, int protocol)
{
    NEXT(int, "socket", int, int, int);
    return fails("socket", ANY, -1, "") ? -1 : next(family, kind, protocol);
}

int socketpair(int family, int kind, int protocol, int ends[2])
{
    NEXT(int, "socketpair", int, int, int, int *);
    return fails("socketpair", ANY, -1, "") ? -1 : next(family, kind, protocol, ends);
}

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
    NEXT(int, "connect", int, const struct sockaddr *, socklen_t);
    return fails("connect", ANY, fd, NULL) ? -1 : next(fd, address, length);
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    NEXT(int, "accept4", int, struct sockaddr *, socklen_t *, int);
    return fails("accept", ANY, fd, NULL) ? -1 : next(fd, address, length, flags);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with)
{
    NEXT(int, "pthread_create", pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    return fails("pthread_create", ANY, -1, "") ? errno : next(thread, how, run, with);
}

pid_t fork(void)
{
    NEXT(pid_t, "fork", void);
    return fails("fork", ANY, -1, "") ? -1 : next();
}

pid_t vfork(void)
{
    return fork(); /* a function of ours cannot return twice on one stack */
}

int execve(const char *path, char *const arguments[], char *const environment[])
{
    NEXT(int, "execve", const char *, char *const *, char *const *);
    return fails("execve", ANY, -1, path) ? -1 : next(path, arguments, environment);
}

int execv(const char *path, char *const arguments[])
{
    NEXT(int, "execv", const char *, char *const *);
    return fails("execve", ANY, -1, path) ? -1 : next(path, arguments);
}

int poll(struct pollfd *fds, nfds_t count, int timeout)
{
    NEXT(int, "poll", struct pollfd *, nfds_t, int);
    return fails("poll", ANY, -1, "") ? -1 : next(fds, count, timeout);
}

int eventfd(unsigned value, int flags)
{
    NEXT(int, "eventfd", unsigned, int);
    return fails("eventfd", ANY, -1, "") ? -1 : next(value, flags);
}

int pipe2(int ends[2], int flags)
{
    NEXT(int, "pipe2", int *, int);
    return fails("pipe2", ANY, -1, "") ? -1 : next(ends, flags);
}

int fsync(int fd)
{
    NEXT(int, "fsync", int);
    return fails("fsync", ANY, fd, NULL) ? -1 : next(fd);
}
