"""The parts of the examples that fine-tune language models and vision transformers, one a file."""
