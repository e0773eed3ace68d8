"""Set before any test module imports torch: the suites run on few, shared cores."""

import os

# A thread that spins for work takes the core from the process that would bring it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
