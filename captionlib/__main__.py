"""`python -m captionlib ...` is the same as the command `captionlib ...`."""

import sys

from captionlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
