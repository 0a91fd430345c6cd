"""Components that several families share: text encoders, tokenizers and VAEs."""
