"""`python -m moirai …`: the same command as `moirai …`."""

import sys

from moirai.cli import main

if __name__ == "__main__":
    sys.exit(main())
