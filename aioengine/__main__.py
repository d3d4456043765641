"""``python -m aioengine`` is the command ``aioengine``."""

import sys

from aioengine.cli.main import main

sys.exit(main())
