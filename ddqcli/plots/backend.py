"""Import matplotlib even if MPLBACKEND names an unknown backend.

A known one holds for the process, as if matplotlib had read it itself.
"""

import os
from contextlib import suppress

MPLBACKEND = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
finally:
    if MPLBACKEND is not None:
        os.environ["MPLBACKEND"] = MPLBACKEND
if MPLBACKEND:
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = MPLBACKEND
