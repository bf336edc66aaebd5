"""Keras 3 rebuilds of the origin's nets, independent of jaxft, for the parity tests."""
