"""torchrun that ends with its workers' own exit status and leaves the last word to their message.

`python -m megatron_iwsft.torchrun [torchrun options] SCRIPT ARGS…`. Plain torchrun works too; it ends with status 1 whatever
the workers said, and adds a traceback of its own to a user's mistake.
"""

from __future__ import annotations

import logging
import os
import sys


def main() -> int:
    # Workers share the machine's cores; one thread each unless the user says otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
