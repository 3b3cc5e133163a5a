# cython: language_level=3
"""The dynamic loader: what is loaded, opening libraries, and where addresses lie."""

import os
import sys

from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset, strdup

cdef extern from "dlfcn.h" nogil:
    ctypedef struct Dl_info:
        const char *dli_fname
    ctypedef struct Dl_serpath:
        char *dls_name
    ctypedef struct Dl_serinfo:
        size_t dls_size
        unsigned int dls_cnt
        Dl_serpath *dls_serpath
    int RTLD_NOW, RTLD_LOCAL, RTLD_NOLOAD, RTLD_DI_SERINFO, RTLD_DI_SERINFOSIZE
    int dlinfo(void *handle, int request, void *answer)
    void *dlopen(const char *name, int flags)
    void *dlsym(void *handle, const char *symbol)
    int dladdr(const void *address, Dl_info *info)
    char *dlerror()

cdef extern from "link.h" nogil:
    cdef struct dl_phdr_info:
        const char *dlpi_name
    int dl_iterate_phdr(int (*callback)(dl_phdr_info *, size_t, void *) noexcept nogil, void *data)

__all__ = [
    "address_file",
    "loaded_libraries",
    "open_error",
    "open_library",
    "search_path",
    "symbol",
]


cdef struct Loaded:
    size_t count, room
    char **names
    bint failed


cdef int _collect(dl_phdr_info *entry, size_t size, void *data) noexcept nogil:
    cdef Loaded *loaded = <Loaded *>data
    cdef char **names
    if entry.dlpi_name == NULL or entry.dlpi_name[0] == 0:
        return 0
    if loaded.count == loaded.room:
        names = <char **>realloc(loaded.names, (2 * loaded.room + 64) * sizeof(char *))
        loaded.failed = names == NULL
        if loaded.failed:
            return 1
        loaded.names, loaded.room = names, 2 * loaded.room + 64
    loaded.names[loaded.count] = strdup(entry.dlpi_name)
    loaded.failed = loaded.names[loaded.count] == NULL
    if loaded.failed:
        return 1
    loaded.count += 1
    return 0


def loaded_libraries():
    """Paths of all shared libraries of this process, global and local, in order of loading."""
    cdef Loaded loaded
    cdef size_t i
    memset(&loaded, 0, sizeof(loaded))
    # The loader's lock is held meanwhile: nothing of Python may be done.
    dl_iterate_phdr(_collect, &loaded)
    try:
        if loaded.failed:
            raise MemoryError("no memory for the list of loaded libraries")
        paths = []
        for i in range(loaded.count):
            paths.append(os.fsdecode(<bytes>loaded.names[i]))
        return paths
    finally:
        for i in range(loaded.count):
            free(loaded.names[i])
        free(loaded.names)


def open_library(str path, bint only_loaded=False):
    """Handle of a library, or 0; `open_error` says why."""
    cdef bytes name = os.fsencode(path)
    cdef const char *text = name
    cdef int flags = RTLD_NOW | RTLD_LOCAL | (RTLD_NOLOAD if only_loaded else 0)
    cdef size_t handle
    with nogil:
        handle = <size_t>dlopen(text, flags)
    return handle


def open_error():
    """Why the last library was not opened."""
    cdef char *text = dlerror()
    return "no reason is told" if text == NULL else os.fsdecode(<bytes>text)


def symbol(size_t handle, str name):
    """Address of a symbol in a library or in what it depends on, or 0."""
    cdef bytes text = name.encode()
    return <size_t>dlsym(<void *>handle, text)


def address_file(size_t address):
    """Path of the library that an address lies in, by dladdr; empty where there is none."""
    cdef Dl_info place
    if address == 0 or dladdr(<void *>address, &place) == 0 or place.dli_fname == NULL:
        return ""
    return os.fsdecode(<bytes>place.dli_fname)


def search_path(size_t handle):
    """Folders in which the loader looks for what a library needs, its own RUNPATH among them."""
    cdef Dl_serinfo size
    cdef Dl_serinfo *found
    cdef unsigned int i
    if dlinfo(<void *>handle, RTLD_DI_SERINFOSIZE, &size) != 0:
        return []
    found = <Dl_serinfo *>malloc(size.dls_size)
    if found == NULL:
        raise MemoryError("no memory for a search path")
    try:
        found.dls_size, found.dls_cnt = size.dls_size, size.dls_cnt
        if dlinfo(<void *>handle, RTLD_DI_SERINFO, found) != 0:
            return []
        folders = []
        for i in range(found.dls_cnt):
            folders.append(os.fsdecode(<bytes>found.dls_serpath[i].dls_name))
        return folders
    finally:
        free(found)


# A free-threaded interpreter turns the GIL on for modules that do not say they can do without;
# only where it was told not to, by -X gil=0 or PYTHON_GIL=0, does it go on without one.
if hasattr(sys, "_is_gil_enabled") and not sys._is_gil_enabled():
    raise ImportError(
        "kvsig needs the GIL, and this free-threaded interpreter was told to keep it off: "
        "leave out -X gil=0, and unset PYTHON_GIL"
    )
