"""Writing what one model would write, a few tokens at a time, because another has guessed them.

speculation.py   the drafter guesses, the verifier decides, the drafter learns from what was decided
rejection.py     how it is decided: rejection sampling, after which the text is the verifier's own
verifier.py      many tokens scored in one pass, and taken back
"""

from longread.speculative.rejection import Verdict, verdict
from longread.speculative.speculation import Round, Speculation

__all__ = ["Round", "Speculation", "Verdict", "verdict"]
