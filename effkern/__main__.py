"""`python -m effkern` is `effkern`."""

import sys

from effkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
