"""The command line of lm-evaluation-harness, which knows "longread" here."""

import sys

from longread.lm_eval.adapter import main

if __name__ == "__main__":
    sys.exit(main())
