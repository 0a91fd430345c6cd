"""The syntax of prompts."""
