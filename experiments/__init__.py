"""The experiments, each a command: python -m experiments.vgg16_statefarm.

A train step on a CPU takes gigabytes and gives them back, again and again, which Linux hands out in pages of 4 kB where
programs have to ask for larger ones: a tenth to a sixth of the step. glibc asks if it is told to before the process
starts, so the command starts itself once more.
"""

import os
import sys

# sys.argv is that while Python imports the package of `python -m experiments.…`, and at no other time.
if sys.platform == "linux" and sys.argv[0] == "-m" and not {"GLIBC_TUNABLES", "JAXFT_RESTARTED"} & set(os.environ):
    os.environ |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAXFT_RESTARTED": "1"}
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
