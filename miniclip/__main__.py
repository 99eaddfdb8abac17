"""python -m miniclip: the same as the `miniclip` command."""

import sys

from miniclip.commands.main import main

sys.exit(main())
