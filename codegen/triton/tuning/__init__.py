"""What of the Triton backend is tuned: templates as spaces of cuts, and their measurement."""
