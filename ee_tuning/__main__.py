"""`python -m ee_tuning` is the same as `ee-tuning`, in the form that torchrun needs."""

import sys

from ee_tuning.interrupts import end_at_once

end_at_once()  # before the other imports, which take a while

from ee_tuning.cli import main  # noqa: E402

if __name__ == "__main__":  # processes spawned to tokenize or to write checkpoints import this file, too
    sys.exit(main())
