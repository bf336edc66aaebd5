"""The experiments, each a command: python -m experiments.vgg16_statefarm.

A train step on a CPU takes gigabytes and gives them back, again and again, which Linux hands out in pages of 4 kB where
programs have to ask for larger ones: a tenth to a sixth of the step. glibc asks if it is told to before the process
starts, so the command starts itself once more.
"""

import os
import sys

module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
if sys.platform == "linux" and module.startswith("experiments.") and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
