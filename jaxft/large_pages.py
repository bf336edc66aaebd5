"""Memory in large pages for a command.

A train step on a CPU takes gigabytes and gives them back, again and again. Linux hands them out in pages of 4 kB
unless a program asks for larger ones, which costs a tenth to a sixth of the step. glibc asks if it is told to before a
process starts, so the command starts itself once more.
"""

import os
import sys


def restart() -> None:
    """Starts this command again with large pages, once; does nothing off Linux or where GLIBC_TUNABLES is set.

    To be called by a command before it imports JAX:

        if __name__ == "__main__":  # before JAX is imported, so that nothing is imported twice
            from jaxft.large_pages import restart

            restart()

    A module that is not what the interpreter was started for (in a notebook, say) is left to run as it is.
    """
    spec = sys.modules["__main__"].__spec__
    started = (spec.name if spec else sys.argv[0]) in sys.orig_argv
    if sys.platform == "linux" and started and not {"GLIBC_TUNABLES", "JAXFT_RESTARTED"} & set(os.environ):
        asking = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAXFT_RESTARTED": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], asking)
