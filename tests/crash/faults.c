/* Preloaded into a process, counts its operations on files under one folder, and has one of them fail.

   arm(prefix, at, error, log): from then on each operation under `prefix` gets a number from 1 and a line in the file of
   descriptor `log`: number, call, path, and where it goes or how long it is. Number `at` does not happen: with error 0 the process is killed in its place; with a positive one
   it fails, with a negative one it and all that follow fail (a disk that is full stays full). At 0 nothing fails. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static long at, count;
static int error, log_file = -1;
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

void arm(const char *folder, long number, int failure, int log) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    at = number, error = failure, count = 0, log_file = log;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Whether an operation is to fail; errno is set. */
static int fails(const char *what, const char *path, const char *to) {
    if (log_file < 0 || strncmp(path, prefix, strlen(prefix)) != 0) return 0;
    pthread_mutex_lock(&one);
    long number = ++count;
    int hit = number == at || (at && error < 0 && number > at);
    dprintf(log_file, "%ld\t%s\t%s\t%s%s\n", number, what, path, to, hit ? "\tFAILS" : "");
    if (hit && !error) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    pthread_mutex_unlock(&one);
    if (hit) errno = error < 0 ? -error : error;
    return hit;
}

static int fails_open(const char *what, int fd) {
    char link[64], path[PATH_MAX];
    if (log_file < 0 || fd == log_file) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    struct stat found;
    char size[32];
    snprintf(size, sizeof size, "%lld", fstat(fd, &found) ? -1LL : (long long)found.st_size);
    return fails(what, path, size);
}

/* A path of an *at call, absolute. */
static const char *whole(int dir, const char *path, char *room) {
    if (path[0] == '/') return path;
    char link[64];
    ssize_t length = -1;
    if (dir == AT_FDCWD) {
        if (getcwd(room, PATH_MAX)) length = strlen(room);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        length = readlink(link, room, PATH_MAX - 1);
    }
    if (length < 0) return path;
    snprintf(room + length, PATH_MAX - length, "/%s", path);
    return room;
}

#define WRITES(flags) ((flags) & (O_CREAT | O_TRUNC))

#define OPEN(name, dir_parameter, dir, ...)                                               \
    int name(dir_parameter const char *path, int flags, ...) {                            \
        char room[PATH_MAX];                                                              \
        va_list rest;                                                                     \
        va_start(rest, flags);                                                            \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;           \
        va_end(rest);                                                                     \
        if (WRITES(flags) && fails("open", whole(dir, path, room), "")) return -1;        \
        return REAL(name)(__VA_ARGS__, flags, mode);                                      \
    }
#define COMMA ,
OPEN(open, , AT_FDCWD, path)
OPEN(open64, , AT_FDCWD, path)
OPEN(openat, int folder COMMA, folder, folder, path)
OPEN(openat64, int folder COMMA, folder, folder, path)

#define ON_OPEN(result, name, parameters, ...)                  \
    result name parameters {                                    \
        if (fails_open(#name, fd)) return -1;                   \
        return REAL(name)(__VA_ARGS__);                         \
    }
ON_OPEN(ssize_t, write, (int fd, const void *from, size_t size), fd, from, size)
ON_OPEN(ssize_t, pwrite, (int fd, const void *from, size_t size, off_t place), fd, from, size, place)
ON_OPEN(ssize_t, pwrite64, (int fd, const void *from, size_t size, off64_t place), fd, from, size, place)
ON_OPEN(ssize_t, writev, (int fd, const struct iovec *from, int parts), fd, from, parts)
ON_OPEN(ssize_t, pwritev, (int fd, const struct iovec *from, int parts, off_t place), fd, from, parts, place)
ON_OPEN(ssize_t, pwritev64, (int fd, const struct iovec *from, int parts, off64_t place), fd, from, parts, place)
ON_OPEN(int, fsync, (int fd), fd)
ON_OPEN(int, fdatasync, (int fd), fd)
ON_OPEN(int, ftruncate, (int fd, off_t size), fd, size)
ON_OPEN(int, ftruncate64, (int fd, off64_t size), fd, size)

#define ON_PATH(name, parameters, dir, ...)                                  \
    int name parameters {                                                    \
        char room[PATH_MAX];                                                 \
        if (fails(#name, whole(dir, path, room), "")) return -1;             \
        return REAL(name)(__VA_ARGS__);                                      \
    }
ON_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, path, mode)
ON_PATH(mkdirat, (int folder, const char *path, mode_t mode), folder, folder, path, mode)
ON_PATH(unlink, (const char *path), AT_FDCWD, path)
ON_PATH(unlinkat, (int folder, const char *path, int flags), folder, folder, path, flags)
ON_PATH(rmdir, (const char *path), AT_FDCWD, path)

#define RENAME(name, parameters, from_folder, to_folder, ...)                                               \
    int name parameters {                                                                                   \
        char room[PATH_MAX], other[PATH_MAX];                                                               \
        if (fails("rename", whole(from_folder, path, room), whole(to_folder, to, other))) return -1;        \
        return REAL(name)(__VA_ARGS__);                                                                     \
    }
RENAME(rename, (const char *path, const char *to), AT_FDCWD, AT_FDCWD, path, to)
RENAME(renameat, (int from, const char *path, int into, const char *to), from, into, from, path, into, to)
RENAME(renameat2, (int from, const char *path, int into, const char *to, unsigned flags), from, into, from, path, into,
       to, flags)
