"""The version of Safelight. It is here, and not in the metadata of an installation, so that a checkout knows it too."""

VERSION = "0.1.0"
