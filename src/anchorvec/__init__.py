"""Turn an open decoder LLM into a text embedder."""
