"""The experiments, each a command: python -m experiments.vgg16_statefarm."""
