"""jaxft: fine-tune ImageNet-pretrained convolutional networks in JAX.

Modules are imported by name (`from jaxft import model, task`): this one imports nothing, so that a script pays only
for what it uses.
"""

__version__ = "0.1.0"
