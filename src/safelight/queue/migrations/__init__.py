"""The migrations of the database, by number. Released migrations never change; a new version only adds some."""
