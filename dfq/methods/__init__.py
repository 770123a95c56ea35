"""One file per published method; each reads top to bottom like its paper's algorithm box."""
