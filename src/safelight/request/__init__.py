"""What is asked for, what is answered, and what is reported meanwhile: frozen values without torch."""
