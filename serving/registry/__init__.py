"""Models by name: which files they are made of, and how they are to be asked."""
