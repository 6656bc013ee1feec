/* A preloaded library that makes a part of one file unreadable, as a bad sector does.
 *
 * The file that UNREADABLE names has `struct bad`, and counts as it is at each call.  A read that begins in
 * the bad part fails with EIO, and one that reaches it is short.  In a mapping that is made afterwards the
 * bad part, whole pages then, cannot be touched: the process ends by a signal, and the kernel says EFAULT,
 * as it does for a page that no disk can give.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

struct bad {
    off_t start, end;
    char path[PATH_MAX];
};
static const struct bad *bad;

__attribute__((constructor)) static void look(void)
{
    const char *told = getenv("UNREADABLE");
    int fd = told ? open(told, O_RDONLY | O_CLOEXEC) : -1;
    void *made;

    if (fd < 0)
        return;
    made = REAL("mmap64", void *(*)(void *, size_t, int, int, int, off_t))(
        NULL, sizeof(*bad), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (made != MAP_FAILED)
        bad = made;
}

static int is_bad_file(int fd)
{
    char link[64], path[PATH_MAX];
    int saved = errno;
    ssize_t length;

    if (!bad || !bad->end)
        return 0;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof(path) - 1);
    errno = saved;
    if (length < 0)
        return 0;
    path[length] = 0;
    return !strcmp(path, bad->path);
}

/* How many of these bytes can be read; -1: not even the first one. */
static ssize_t readable(int fd, size_t count, off_t offset)
{
    if (!is_bad_file(fd) || offset >= bad->end || offset + (off_t)count <= bad->start)
        return count;
    return offset < bad->start ? bad->start - offset : -1;
}

ssize_t pread64(int fd, void *into, size_t count, off_t offset)
{
    ssize_t most = readable(fd, count, offset);

    if (most < 0) {
        errno = EIO;
        return -1;
    }
    return REAL("pread64", ssize_t (*)(int, void *, size_t, off_t))(fd, into, most, offset);
}

ssize_t pread(int fd, void *into, size_t count, off_t offset)
{
    return pread64(fd, into, count, offset);
}

ssize_t read(int fd, void *into, size_t count)
{
    ssize_t most = bad ? readable(fd, count, lseek(fd, 0, SEEK_CUR)) : (ssize_t)count;

    if (most < 0) {
        errno = EIO;
        return -1;
    }
    return REAL("read", ssize_t (*)(int, void *, size_t))(fd, into, most);
}

ssize_t preadv64(int fd, const struct iovec *pieces, int count, off_t offset)
{
    struct iovec first = pieces[0];
    size_t total = 0;
    ssize_t most;

    for (int i = 0; i < count; i++)
        total += pieces[i].iov_len;
    most = readable(fd, total, offset);
    if (most == (ssize_t)total)
        return REAL("preadv64", ssize_t (*)(int, const struct iovec *, int, off_t))(
            fd, pieces, count, offset);
    if (most > 0 && (size_t)most < first.iov_len)
        first.iov_len = most;
    if (most < 0) {
        errno = EIO;
        return -1;
    }
    return REAL("preadv64", ssize_t (*)(int, const struct iovec *, int, off_t))(fd, &first, 1, offset);
}

ssize_t preadv(int fd, const struct iovec *pieces, int count, off_t offset)
{
    return preadv64(fd, pieces, count, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    (void)flags;
    return preadv64(fd, pieces, count, offset);
}

ssize_t preadv2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    (void)flags;
    return preadv64(fd, pieces, count, offset);
}

void *mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    char *made = REAL("mmap64", void *(*)(void *, size_t, int, int, int, off_t))(
        at, length, protection, flags, fd, offset);

    if (made != MAP_FAILED && fd >= 0 && is_bad_file(fd) && bad->start >= offset &&
        bad->start < offset + (off_t)length)
        mprotect(made + (bad->start - offset), bad->end - bad->start, PROT_NONE);
    return made;
}

void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    return mmap64(at, length, protection, flags, fd, offset);
}
