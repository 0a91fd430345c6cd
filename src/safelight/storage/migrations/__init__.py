"""How the database came to be: numbered steps that are only ever added to."""
