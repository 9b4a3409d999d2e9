"""Text encoders and autoencoders that several models have: how they lie on disk."""
