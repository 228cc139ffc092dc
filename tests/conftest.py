"""Before NumPy is loaded: its BLAS gets one thread, or the tests crawl where something else is busy on the machine."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
