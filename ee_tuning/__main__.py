"""`python -m ee_tuning` is `ee-tuning`; this spelling is the one for torchrun."""

import sys

from ee_tuning.interrupts import end_at_once

end_at_once()  # before the others are imported, which takes a while

from ee_tuning.cli import main  # noqa: E402

if __name__ == "__main__":  # processes that are spawned to tokenize or to write checkpoints import this file anew
    sys.exit(main())
