"""The two ends of the decoder: look-up in the embedding, and loss over the vocabulary."""
