"""``python -m fastpeft``: the commands of `fastpeft.cli`, or a script run with `fastpeft.patch` on."""

import sys

from fastpeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
