"""python -m fastdiff.cli"""

import sys

from .commands import main

sys.exit(main())
