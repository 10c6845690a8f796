"""Reports of tuning studies: one HTML page, or tables of the terminal."""
