"""`python -m longread` is the command line."""

import sys

from longread.cli import main

sys.exit(main())
