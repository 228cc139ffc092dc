"""OpenAI's interface to a model."""
