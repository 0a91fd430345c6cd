"""The HTTP APIs: Safelight's own, OpenAI's, AUTOMATIC1111's, and added ones."""
