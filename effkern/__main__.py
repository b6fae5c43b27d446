"""`python -m effkern` is `effkern`."""

import os
import sys

from effkern.cli import main

if __name__ == "__main__":
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several ranks: torch's static objects are not destroyed, as threads of the process groups that still
        # use them have ended finished ranks by SIGABRT. Files are closed and groups left by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
