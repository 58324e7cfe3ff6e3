"""`python -m ee_tuning` is `ee-tuning`; this spelling is the one for torchrun."""
import sys

from ee_tuning.cli import main

if __name__ == "__main__":  # Megatron's checkpoint writers are spawned processes that import this file anew
    sys.exit(main())
