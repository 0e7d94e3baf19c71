"""CacheBlend for JAX: answer RAG prompts from precomputed, position-free chunk KV caches at full quality."""
