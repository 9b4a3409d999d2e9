"""What a run tells of itself: metadata, the head of its metrics, its record, the summary in the log."""
