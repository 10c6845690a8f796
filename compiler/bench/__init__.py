"""What `tilewright bench` measures: our engine, the uncompiled model, the floor of the matmuls."""
