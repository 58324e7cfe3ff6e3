"""How torch's threads wait for each other on a CPU."""

import os

SPINS = "1000"
"""Spins of a thread at a barrier before it sleeps, about 25 µs. OpenMP's default of 300,000 occupies a core that the
awaited thread may need on a busy machine; below 1,000 an idle machine decodes more slowly.
"""


def shorten_spins() -> None:
    """Sets GOMP_SPINCOUNT, unless the user has set it or OMP_WAIT_POLICY.

    OpenMP reads it once, when torch loads it: after `import torch` it has no effect on this process.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
