"""`python -m tests.notebooks`: see `tests.notebooks.runner`."""

import sys

from tests.notebooks.runner import main

sys.exit(main())
