"""What `tilewright inspect` shows: facts of an engine as text, as data, and as one HTML page."""
