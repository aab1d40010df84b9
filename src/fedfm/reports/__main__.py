"""``python -m fedfm.reports RUN`` writes the run's report."""

import sys
from pathlib import Path

from fedfm.core.errors import FedfmError
from fedfm.reports import render

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fedfm.reports RUN")
    try:
        print(render(Path(sys.argv[1])))
    except FedfmError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
