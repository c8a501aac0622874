"""`python -m ranklog.cli`: the same as the script `ranklog`."""

import sys

from ranklog.cli import main

sys.exit(main())
