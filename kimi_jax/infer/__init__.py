"""Inference: latent cache, engine with continuous batching, sampler; chat and server stand on them."""
