"""The command line: `python -m trt_dynamo`, or `trt-dynamo` where the package is installed."""

from __future__ import annotations

import os
import sys

from trt_dynamo.cli import app
from trt_dynamo.errors import TrtDynamoError


def main() -> None:
    """Runs a command. Exit codes: 0 done, 1 it failed or found something wrong, 2 it was not called as it should be."""
    try:
        app()
    except TrtDynamoError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
