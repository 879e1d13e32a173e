"""Scorers that measure: preference models, detectors, letters, pixels. Each is a class of plain arguments; its objects
are called with a batch of (record, picture) pairs and return one `weft.types.Score` each."""
