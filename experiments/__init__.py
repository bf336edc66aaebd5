"""The experiments, each a command: python -m experiments.vgg16_statefarm."""

import signal
import sys

if sys.argv[0] == "-m":  # one is being started; until `command.exits`, its imports take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that Ctrl-C ends it, and prints no traceback of an import
