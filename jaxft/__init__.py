"""jaxft: fine-tune ImageNet-pretrained convolutional networks in JAX."""
