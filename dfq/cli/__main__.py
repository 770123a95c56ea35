"""``python -m dfq.cli``, where the command ``dfq`` is not on the path."""

import sys

from dfq.cli.dispatch import main

sys.exit(main())
