"""The IR: typed, hash-consed dataflow graphs over symbolic shapes, one schema object an op."""
