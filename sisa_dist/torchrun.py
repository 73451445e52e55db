"""`python -m sisa_dist.torchrun`: torchrun, with the same arguments, that leaves with the code its ranks left with.

torchrun itself leaves with 1 whatever they said, and the codes of `sisa train` say what to do next: 2 mend something,
75 run me again, 76 start the next stage. It adds nothing else.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(arguments: list[str] | None = None) -> None:
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode > 1:  # asked for: what it wants to say it has said
            sys.exit(failure.exitcode)
        raise  # a rank failed or was killed: torchrun's own report names it


if __name__ == "__main__":
    main()
