"""Scripts that a user types, and the modules that each needs alone. Being a package keeps an installed `tools` out."""
