# How copies are made: one enumeration for planner, core and reports.
cdef enum Path:
    PATH_BATCH = 0
    PATH_LOOP = 1
    PATH_STRIDED = 2
    PATH_KERNEL = 3
