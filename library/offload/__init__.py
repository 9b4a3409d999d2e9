"""Memory of the device that is spared: frozen weights and checkpoints in host memory, copied in ahead of their use."""
