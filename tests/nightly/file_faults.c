/* Makes the n-th change that a process makes to files in some folders the last one: the process is killed before it, or
   the disk is full from then on. Loaded by LD_PRELOAD; does nothing until it is armed. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char folders[4 * PATH_MAX];
static atomic_int changes;
static int last, is_full, list = -1;
static pid_t armed;

/* folders: separated by colons. number: of the change, from 1; 0 for none. full: no space is left from that change on,
   instead of a kill. listing: file that takes a line for each change, or NULL. */
void faults_arm(const char *names, int number, int full, const char *listing) {
    snprintf(folders, sizeof folders, "%s", names);
    last = number;
    is_full = full;
    list = listing ? (int)syscall(SYS_openat, AT_FDCWD, listing, O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
    armed = getpid();
}

/* The part of a path below one of the folders, or NULL. */
static const char *below(const char *path) {
    char names[sizeof folders], *rest;
    memcpy(names, folders, sizeof names);
    for (char *name = strtok_r(names, ":", &rest); name; name = strtok_r(NULL, ":", &rest)) {
        size_t length = strlen(name);
        if (!strncmp(path, name, length) && path[length] == '/')
            return path + length + 1;
    }
    return NULL;
}

static void of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void whole(int folder, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    char base[PATH_MAX] = "";
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        of_descriptor(folder, base);
    }
    snprintf(path, PATH_MAX, "%.*s/%s", PATH_MAX / 2, base, name);
}

/* Counts a change; whether it must fail for want of space. takes_space: whether it can. */
static int fails(const char *what, const char *path, int takes_space) {
    const char *name;
    if (!armed || armed != getpid() || !(name = below(path))) return 0;
    int number = ++changes;
    if (list >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", what, name);
        syscall(SYS_write, list, line, length);
    }
    if (!last || number < last) return 0;
    if (!is_full) {
        syscall(SYS_kill, armed, SIGKILL);
        for (;;) pause();
    }
    if (takes_space) errno = ENOSPC;
    return takes_space;
}

static int fails_at(const char *what, int folder, const char *name, int takes_space) {
    if (!armed) return 0;
    char path[PATH_MAX];
    whole(folder, name, path);
    return fails(what, path, takes_space);
}

static int is_there(int folder, const char *name) {
    return !syscall(SYS_faccessat, folder, name, F_OK);
}

static int fails_in(const char *what, int descriptor, int takes_space) {
    if (!armed) return 0;
    char path[PATH_MAX];
    of_descriptor(descriptor, path);
    return fails(what, path, takes_space);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                      \
    int name(const char *path, int flags, ...) {                                        \
        va_list rest;                                                                   \
        va_start(rest, flags);                                                          \
        mode_t mode = va_arg(rest, mode_t);                                             \
        va_end(rest);                                                                   \
        int makes = flags & O_TRUNC || (flags & O_CREAT && !is_there(AT_FDCWD, path));  \
        if (makes && fails_at("open", AT_FDCWD, path, flags & O_CREAT)) return -1;      \
        return REAL(name)(path, flags, mode);                                           \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                    \
    int name(int folder, const char *path, int flags, ...) {                            \
        va_list rest;                                                                   \
        va_start(rest, flags);                                                          \
        mode_t mode = va_arg(rest, mode_t);                                             \
        va_end(rest);                                                                   \
        int makes = flags & O_TRUNC || (flags & O_CREAT && !is_there(folder, path));    \
        if (makes && fails_at("open", folder, path, flags & O_CREAT)) return -1;        \
        return REAL(name)(folder, path, flags, mode);                                   \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void *bytes, size_t count) {
    if (fails_in("write", descriptor, 1)) return -1;
    return REAL(write)(descriptor, bytes, count);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    if (fails_in("write", descriptor, 1)) return -1;
    return REAL(writev)(descriptor, parts, count);
}

#define PWRITE(name, offset_type)                                                       \
    ssize_t name(int descriptor, const void *bytes, size_t count, offset_type offset) { \
        if (fails_in("write", descriptor, 1)) return -1;                                \
        return REAL(name)(descriptor, bytes, count, offset);                            \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define TRUNCATE(name, offset_type)                                                     \
    int name(int descriptor, offset_type length) {                                      \
        if (fails_in("truncate", descriptor, 1)) return -1;                             \
        return REAL(name)(descriptor, length);                                          \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

int rename(const char *from, const char *to) {
    if (fails_at("rename", AT_FDCWD, to, 0)) return -1;
    return REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    if (fails_at("rename", to_folder, to, 0)) return -1;
    return REAL(renameat)(from_folder, from, to_folder, to);
}

int mkdir(const char *path, mode_t mode) {
    if (!is_there(AT_FDCWD, path) && fails_at("mkdir", AT_FDCWD, path, 1)) return -1;
    return REAL(mkdir)(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    if (!is_there(folder, path) && fails_at("mkdir", folder, path, 1)) return -1;
    return REAL(mkdirat)(folder, path, mode);
}

int unlink(const char *path) {
    if (is_there(AT_FDCWD, path) && fails_at("unlink", AT_FDCWD, path, 0)) return -1;
    return REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags) {
    if (is_there(folder, path) && fails_at("unlink", folder, path, 0)) return -1;
    return REAL(unlinkat)(folder, path, flags);
}

int rmdir(const char *path) {
    if (fails_at("rmdir", AT_FDCWD, path, 0)) return -1;
    return REAL(rmdir)(path);
}

int fsync(int descriptor) {
    if (fails_in("fsync", descriptor, 0)) return -1;
    return REAL(fsync)(descriptor);
}
