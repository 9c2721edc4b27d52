"""`python -m moirai …`: the same command as `moirai …`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # The current folder, put there for -m: the user's json.py is not for us to import.
        del sys.path[0]

    from moirai.cli import main

    sys.exit(main())
