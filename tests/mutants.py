"""One-line breaks of the code and the tests that must notice them; `make mutants` tries each.

``original`` is the whole line without its indentation and must occur once in its file, so change it
here when the code changes. Add a break with each new capability: the one that a reader would miss.
"""

from tools.mutants import Mutant

MUTANTS: list[Mutant] = []
