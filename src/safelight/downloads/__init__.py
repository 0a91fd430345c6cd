"""Downloads models from Hugging Face, Civitai and other servers, and adds them to the library."""
