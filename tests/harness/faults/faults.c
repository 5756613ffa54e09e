// What a test puts between a member and its system, with LD_PRELOAD: a disk that takes long to sync, a wall clock that jumps,
// a disk without room. The member is the one that is shipped; the monotonic clock, which no operator can set, stays as it is.
//
// The file that TENURE_FAULTS names holds the faults, in the order of struct faults; the test writes it at any time. It is
// mapped, so that a look at it costs nothing.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct faults {
    // Each sync of a file takes so much longer.
    volatile int64_t sync_delay_us;
    // The wall clock shows so much more.
    volatile int64_t clock_offset_ms;
    // If not 0, no more is said to be free on any disk, less 1.
    volatile int64_t free_bytes_plus_1;
    // If not 0, nothing can be written to files.
    volatile int64_t no_room;
};

static struct faults none;
static struct faults *faults = &none;

__attribute__((constructor)) static void map_faults(void) {
    const char *path = getenv("TENURE_FAULTS");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *mapped = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED)
        faults = mapped;
    close(file);
}

// The function that would have been called without us.
#define NEXT(name, ...) \
    static __typeof__(name) *next; \
    if (!next) \
        next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name); \
    return next(__VA_ARGS__)

static void delay_sync(void) {
    int64_t us = faults->sync_delay_us;
    if (us > 0) {
        struct timespec delay = {us / 1000000, us % 1000000 * 1000};
        nanosleep(&delay, NULL);
    }
}

int fdatasync(int file) {
    delay_sync();
    NEXT(fdatasync, file);
}

int fsync(int file) {
    delay_sync();
    NEXT(fsync, file);
}

static void shift(struct timespec *time, int64_t ms) {
    int64_t ns = time->tv_nsec + ms % 1000 * 1000000;
    int64_t carry = ns < 0 ? -1 : ns / 1000000000;
    time->tv_sec += ms / 1000 + carry;
    time->tv_nsec = ns - carry * 1000000000;
}

static int true_clock_gettime(clockid_t clock, struct timespec *time) { NEXT(clock_gettime, clock, time); }

int clock_gettime(clockid_t clock, struct timespec *time) {
    int failed = true_clock_gettime(clock, time);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        shift(time, faults->clock_offset_ms);
    return failed;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    (void)zone;
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now))
        return -1;
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now))
        return (time_t)-1;
    if (result)
        *result = now.tv_sec;
    return now.tv_sec;
}

static int true_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    NEXT(pthread_cond_timedwait, cond, mutex, until);
}

// The system's own clock has not jumped, so a time of the shifted clock is shifted back. A time of the monotonic clock is
// small: it counts from when the machine started.
int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    struct timespec back = *until;
    if (back.tv_sec > 1000000000)
        shift(&back, -faults->clock_offset_ms);
    return true_timedwait(cond, mutex, &back);
}

static int true_statvfs64(const char *restrict path, struct statvfs64 *restrict found) { NEXT(statvfs64, path, found); }

int statvfs64(const char *restrict path, struct statvfs64 *restrict found) {
    int failed = true_statvfs64(path, found);
    int64_t most = faults->free_bytes_plus_1 - 1;
    if (!failed && most >= 0 && found->f_bavail > most / found->f_frsize)
        found->f_bavail = most / found->f_frsize;
    return failed;
}

// Whether a write to this file fails for want of room.
static int is_full(int file) {
    struct stat found;
    if (!faults->no_room || fstat(file, &found) || !S_ISREG(found.st_mode))
        return 0;
    errno = ENOSPC;
    return 1;
}

ssize_t write(int file, const void *bytes, size_t count) {
    if (is_full(file))
        return -1;
    NEXT(write, file, bytes, count);
}

ssize_t pwrite(int file, const void *bytes, size_t count, off_t at) {
    if (is_full(file))
        return -1;
    NEXT(pwrite, file, bytes, count, at);
}

ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t at) {
    if (is_full(file))
        return -1;
    NEXT(pwrite64, file, bytes, count, at);
}

int fallocate(int file, int mode, off_t at, off_t count) {
    if (is_full(file))
        return -1;
    NEXT(fallocate, file, mode, at, count);
}

int fallocate64(int file, int mode, off64_t at, off64_t count) {
    if (is_full(file))
        return -1;
    NEXT(fallocate64, file, mode, at, count);
}
