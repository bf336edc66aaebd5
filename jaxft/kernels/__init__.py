"""What a CPU is fast at: convolution, pooling, dense layers and normalisation, with their gradients."""
