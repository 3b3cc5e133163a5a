"""The emulated CUDA runtimes: finding them, building others, and telling them what to do.

An emulated runtime is a shared library that stands in for libcudart, libcuda and NVRTC on a machine
without a GPU and in tests. Device memory is host memory there, streams are queues with deferred
execution, and faults can be ordered. The build makes one for each ABI of the registry;
``KVSIG_CUDART`` set to ``emulated:12.9`` binds kvsig to the one that serves CUDA 12.9, and
``emulated:12.9/13.0`` gives it a driver of CUDA 13.0. ``KVSIG_EMULATED_DRIVER`` puts the driver
into a state of `Control.set_driver`, such as ``stub``. No timing taken on it says anything about
a GPU.
"""

from kvsig.emulated.control import Control, Stream
from kvsig.emulated.libraries import DIRECTORY, Library, available, build, parse, resolve
from kvsig.emulated.starting import start

__all__ = [
    "DIRECTORY",
    "Control",
    "Library",
    "Stream",
    "available",
    "build",
    "parse",
    "resolve",
    "start",
]

# They are known by the name of this package, whatever file they are written in.
for _public in (Control, Library, Stream):
    _public.__module__ = __name__
