"""The IR: typed, hash-consed dataflow graphs over symbolic shapes, with one schema object per op."""
