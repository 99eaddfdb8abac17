"""python -m miniclip: the same as the `miniclip` command."""

import sys

from miniclip.cli import main

sys.exit(main())
