"""A frozen classifier that answers a student's views, and records of its outputs."""
