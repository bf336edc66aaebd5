"""Short scripts, one idea each: python -m examples.bottleneck_svm. Their images are drawn: no results."""
