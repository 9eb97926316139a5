"""What a Python process that a test starts needs to find the tests' own modules."""

import os
import sys


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
