/* Preloaded into a server: logs what it writes to its database and when it syncs it, to the file named by LOG_WRITES.
   A record is a struct below and, for a write, its bytes. Built by tests/faults/disk.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_FILES 65536

struct record {
    double began_at, ended_at; /* CLOCK_MONOTONIC, in seconds */
    int64_t offset, size;      /* of a write; the new size of a truncation */
    int32_t kind, file;        /* 'w', 't', 's', 'c'reated, 'u'nlinked; 1 database, 2 write-ahead log, 3 rollback
                                  journal, 4 the directory of these */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char files[MAX_FILES]; /* by descriptor */
static char directory[4096];
static int log_file = -1;

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
}

static int is_ours(int fd) { return fd >= 0 && fd < MAX_FILES && files[fd]; }

static void note(int file, int kind, double began_at, int64_t offset, int64_t size, const void *data) {
    struct record record = {began_at, now(), offset, size, kind, file};
    struct iovec parts[2] = {{&record, sizeof record}, {(void *)data, kind == 'w' ? (size_t)size : 0}};
    pthread_mutex_lock(&lock);
    if (writev(log_file, parts, 2) != (ssize_t)(parts[0].iov_len + parts[1].iov_len)) abort();
    pthread_mutex_unlock(&lock);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int file_of(const char *path) {
    const char *name = strstr(path, "htm.sqlite3");
    if (name == 0) return directory[0] && strcmp(path, directory) == 0 ? 4 : 0;
    const char *end = strrchr(path, '3') + 1; /* what follows the name of the database */
    if (strcmp(end, "-journal") == 0) return 3;
    return *end == 0 ? 1 : strcmp(end, "-wal") == 0 ? 2 : 0;
}

static void begin_log(const char *path) {
    static int (*real_open)(const char *, int, ...) = 0;
    const char *name = strstr(path, "/htm.sqlite3");
    pthread_mutex_lock(&lock);
    if (log_file < 0 && name != 0) {
        real_open = REAL(open);
        log_file = real_open(getenv("LOG_WRITES"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        memcpy(directory, path, (size_t)(name - path));
    }
    pthread_mutex_unlock(&lock);
}

static int opened(int fd, const char *path, int flags, double began_at) {
    if (fd < 0 || fd >= MAX_FILES) return fd;
    begin_log(path);
    files[fd] = (char)file_of(path);
    if (files[fd] == 3 && (flags & O_CREAT)) note(3, 'c', began_at, 0, 0, 0);
    return fd;
}

#define OPEN(name)                                                                             \
    int name(const char *path, int flags, ...) {                                               \
        va_list rest;                                                                          \
        va_start(rest, flags);                                                                 \
        mode_t mode = va_arg(rest, mode_t);                                                    \
        va_end(rest);                                                                          \
        double began_at = now();                                                               \
        int fd = ((int (*)(const char *, int, ...))REAL(name))(path, flags, mode);             \
        return opened(fd, path, flags, began_at);                                              \
    }
OPEN(open)
OPEN(open64)

#define WRITE(name, offset_t)                                                  \
    ssize_t name(int fd, const void *data, size_t size, offset_t offset) {     \
        double began_at = now();                                               \
        ssize_t done = REAL(name)(fd, data, size, offset);                     \
        if (done > 0 && is_ours(fd)) note(files[fd], 'w', began_at, offset, done, data); \
        return done;                                                           \
    }
WRITE(pwrite, off_t)
WRITE(pwrite64, off64_t)

#define TRUNCATE(name, offset_t)                                      \
    int name(int fd, offset_t size) {                                 \
        double began_at = now();                                      \
        int done = REAL(name)(fd, size);                              \
        if (done == 0 && is_ours(fd)) note(files[fd], 't', began_at, 0, size, 0); \
        return done;                                                  \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                                    \
    int name(int fd) {                                                \
        double began_at = now();                                      \
        int done = REAL(name)(fd);                                    \
        if (done == 0 && is_ours(fd)) note(files[fd], 's', began_at, 0, 0, 0); \
        return done;                                                  \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    double began_at = now();
    int done = REAL(unlink)(path);
    if (done == 0 && file_of(path) == 3) note(3, 'u', began_at, 0, 0, 0);
    return done;
}

int close(int fd) {
    if (fd >= 0 && fd < MAX_FILES) files[fd] = 0;
    return REAL(close)(fd);
}
