"""``python -m qbits``: the command line of `qbits.cli`."""

import sys

from qbits.cli import main

sys.exit(main())
